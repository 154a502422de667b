"""Bringing a configuration of SimpleTuner's: what it says becomes a job, with a report of what became of each key."""

from reverie_client.simpletuner.mapping import Imported, import_configuration
from reverie_client.simpletuner.plan import DatasetPlan
from reverie_client.simpletuner.report import Outcome, Report, ReportLine

__all__ = ["DatasetPlan", "Imported", "Outcome", "Report", "ReportLine", "import_configuration"]
