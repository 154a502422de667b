"""What services need to serve many callers with one model: micro-batches, and one computation per distinct question."""

from reverie_common.concurrency.batching import BatchLimits, BatchObserver, MicroBatcher
from reverie_common.concurrency.parking import Parkable, Parking
from reverie_common.concurrency.single_flight import SingleFlight
from reverie_common.concurrency.streams import as_ready

__all__ = ["BatchLimits", "BatchObserver", "MicroBatcher", "Parkable", "Parking", "SingleFlight", "as_ready"]
