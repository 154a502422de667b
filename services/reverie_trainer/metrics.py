"""What the trainer counts for Prometheus."""

from collections.abc import Sequence

from prometheus_client import Counter, Gauge
from reverie.training.v1 import job_pb2
from reverie_common.telemetry.metrics import REGISTRY

JOBS = Gauge("reverie_trainer_jobs", "Jobs that are not at rest, by state.", ["state"], registry=REGISTRY)
WORKER_STARTS = Counter("reverie_trainer_worker_starts", "Workers that were started.", registry=REGISTRY)
PREPARED_ITEMS = Counter(
    "reverie_trainer_prepared_items",
    "Images and prompts that preparation used, by whether the store held them already.",
    ["kind", "cached"],
    registry=REGISTRY,
)
REJECTED_IMAGES = Counter("reverie_trainer_rejected_images", "Images that could not be used.", registry=REGISTRY)

_STATES = {
    job_pb2.TRAINING_JOB_STATE_QUEUED: "queued",
    job_pb2.TRAINING_JOB_STATE_PREPARING: "preparing",
    job_pb2.TRAINING_JOB_STATE_TRAINING: "training",
}


def count_jobs(states: Sequence[int]) -> None:
    """Set the number of jobs in each state of work."""
    for state, name in _STATES.items():
        JOBS.labels(state=name).set(states.count(state))


def count_preparation(report: job_pb2.PreparationReport) -> None:
    """Count what one preparation used."""
    for kind, num_total, num_cached in (
        ("image", report.num_images, report.num_images_cached),
        ("prompt", report.num_prompts, report.num_prompts_cached),
    ):
        PREPARED_ITEMS.labels(kind=kind, cached="true").inc(num_cached)
        PREPARED_ITEMS.labels(kind=kind, cached="false").inc(max(0, num_total - num_cached))
    REJECTED_IMAGES.inc(len(report.rejected))
