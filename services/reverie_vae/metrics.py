"""Instruments of the VAE service."""

from collections.abc import Sequence

from prometheus_client import Counter, Gauge, Histogram
from reverie_common.telemetry.metrics import LATENCY_BUCKETS_SECONDS, REGISTRY

from reverie_vae.rejections import Reason

QUEUES = ("encode", "decode")
STAGES = ("read", "encode", "store", "decode", "png")

QUEUE_DEPTH = Gauge(
    "reverie_vae_queue_depth",
    "Items that wait for the VAE: images to encode, latents to decode.",
    ("queue",),
    registry=REGISTRY,
)
BATCH_SIZE = Histogram(
    "reverie_vae_batch_size", "Items in one batch.", ("queue",), buckets=(1, 2, 4, 8, 16, 32), registry=REGISTRY
)
QUEUE_WAIT_SECONDS = Histogram(
    "reverie_vae_queue_wait_seconds",
    "Seconds from an item's arrival to the start of its batch.",
    ("queue",),
    buckets=LATENCY_BUCKETS_SECONDS,
    registry=REGISTRY,
)
STAGE_SECONDS = Histogram(
    "reverie_vae_stage_seconds",
    "Seconds of one stage: `read` (fetch, decode, resize, crop) and `store` of one image, `encode` or `decode` of one"
    " batch in the model, `png` of one picture.",
    ("stage",),
    buckets=LATENCY_BUCKETS_SECONDS,
    registry=REGISTRY,
)
MODEL_LOAD_SECONDS = Gauge("reverie_vae_model_load_seconds", "Seconds that loading the VAE took.", registry=REGISTRY)
PARKED = Gauge("reverie_vae_parked", "1 while the VAE waits in host memory for work, else 0.", registry=REGISTRY)
LATENTS = Counter(
    "reverie_vae_latents",
    "Latents answered, by where they came from: `cached` or `computed`.",
    ("source",),
    registry=REGISTRY,
)
REJECTIONS = Counter("reverie_vae_rejections", "Images refused.", ("reason",), registry=REGISTRY)

for _queue in QUEUES:
    for _instrument in (QUEUE_DEPTH, BATCH_SIZE, QUEUE_WAIT_SECONDS):
        _instrument.labels(_queue)
for _stage in STAGES:
    STAGE_SECONDS.labels(_stage)
for _source in ("cached", "computed"):
    LATENTS.labels(_source)
for _reason in Reason:
    REJECTIONS.labels(_reason.value)


class BatchMetrics:
    """A BatchObserver for the batches of one queue, `encode` or `decode`, which is also the name of its stage."""

    def __init__(self, queue: str) -> None:
        self._queue_depth = QUEUE_DEPTH.labels(queue)
        self._batch_size = BATCH_SIZE.labels(queue)
        self._queue_wait_seconds = QUEUE_WAIT_SECONDS.labels(queue)
        self._stage_seconds = STAGE_SECONDS.labels(queue)

    def queue_changed(self, num_waiting: int) -> None:
        """See BatchObserver."""
        self._queue_depth.set(num_waiting)

    def batch_started(self, waits_seconds: Sequence[float]) -> None:
        """See BatchObserver."""
        self._batch_size.observe(len(waits_seconds))
        for seconds in waits_seconds:
            self._queue_wait_seconds.observe(seconds)

    def batch_finished(self, seconds: float) -> None:
        """See BatchObserver."""
        self._stage_seconds.observe(seconds)
