"""Instruments of the encoder service. Labels: the encoder's name, the stage of one embedding."""

from collections.abc import Sequence

from prometheus_client import Counter, Gauge, Histogram
from reverie_common.telemetry.metrics import LATENCY_BUCKETS_SECONDS, REGISTRY

ENCODERS = ("clip_l", "clip_g", "t5", "llama")
STAGES = ("encode", "store")

QUEUE_DEPTH = Gauge(
    "reverie_encoder_queue_depth", "Prompts that wait for their batch to start.", ("encoder",), registry=REGISTRY
)
BATCH_SIZE = Histogram(
    "reverie_encoder_batch_size",
    "Prompts in one batch.",
    ("encoder",),
    buckets=(1, 2, 4, 8, 16, 32, 64, 128),
    registry=REGISTRY,
)
QUEUE_WAIT_SECONDS = Histogram(
    "reverie_encoder_queue_wait_seconds",
    "Seconds from a prompt's arrival to the start of its batch.",
    ("encoder",),
    buckets=LATENCY_BUCKETS_SECONDS,
    registry=REGISTRY,
)
STAGE_SECONDS = Histogram(
    "reverie_encoder_stage_seconds",
    "Seconds of one stage: `encode` one batch in the model, `store` one embedding.",
    ("encoder", "stage"),
    buckets=LATENCY_BUCKETS_SECONDS,
    registry=REGISTRY,
)
MODEL_LOAD_SECONDS = Gauge(
    "reverie_encoder_model_load_seconds", "Seconds that loading an encoder took.", ("encoder",), registry=REGISTRY
)
PARKED = Gauge(
    "reverie_encoder_parked",
    "1 while an encoder waits in host memory for work, else 0.",
    ("encoder",),
    registry=REGISTRY,
)
EMBEDDINGS = Counter(
    "reverie_encoder_embeddings",
    "Embeddings answered, by where they came from: `cached` or `computed`.",
    ("encoder", "source"),
    registry=REGISTRY,
)

for _encoder in ENCODERS:
    for _instrument in (QUEUE_DEPTH, BATCH_SIZE, QUEUE_WAIT_SECONDS, MODEL_LOAD_SECONDS, PARKED):
        _instrument.labels(_encoder)
    for _stage in STAGES:
        STAGE_SECONDS.labels(_encoder, _stage)
    for _source in ("cached", "computed"):
        EMBEDDINGS.labels(_encoder, _source)


class BatchMetrics:
    """A BatchObserver for one encoder's batches."""

    def __init__(self, encoder: str) -> None:
        self._queue_depth = QUEUE_DEPTH.labels(encoder)
        self._batch_size = BATCH_SIZE.labels(encoder)
        self._queue_wait_seconds = QUEUE_WAIT_SECONDS.labels(encoder)
        self._encode_seconds = STAGE_SECONDS.labels(encoder, "encode")

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
        self._encode_seconds.observe(seconds)
