"""Who is told of what a job does: trackers, webhooks, the Hub. Told from the job's history, never by its worker.

An outlet that is slow or away delays no training and no other outlet; after a restart of the trainer each goes on where
it was.
"""

from reverie_trainer.jobs.outlets.dispatcher import Dispatcher
from reverie_trainer.jobs.outlets.factory import OutletFactory, outlet_names

__all__ = ["Dispatcher", "OutletFactory", "outlet_names"]
