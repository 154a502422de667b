"""Instruments of the sampler service. Labels: where a picture came from, what became of a preview."""

from prometheus_client import Counter, Gauge, Histogram
from reverie_common.telemetry.metrics import REGISTRY

DRAW_BUCKETS_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
STEP_BUCKETS_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

PICTURES = Counter(
    "reverie_sampler_pictures",
    "Pictures answered: `drawn`, or `stored` from an earlier request.",
    ("source",),
    registry=REGISTRY,
)
PREVIEWS = Counter(
    "reverie_sampler_previews",
    "Previews `made`, or `dropped` because the VAE service was away or slow.",
    ("outcome",),
    registry=REGISTRY,
)
DRAW_SECONDS = Histogram(
    "reverie_sampler_draw_seconds", "Seconds of drawing one latent.", buckets=DRAW_BUCKETS_SECONDS, registry=REGISTRY
)
STEP_SECONDS = Histogram(
    "reverie_sampler_step_seconds", "Seconds of one sampling step.", buckets=STEP_BUCKETS_SECONDS, registry=REGISTRY
)
WAITING = Gauge("reverie_sampler_waiting", "Requests that wait for their turn.", registry=REGISTRY)
PARKED = Gauge(
    "reverie_sampler_parked", "1 while the transformer waits in host memory for work, else 0.", registry=REGISTRY
)
ADAPTERS = Gauge("reverie_sampler_adapters", "Adapters in memory.", registry=REGISTRY)
MODEL_LOAD_SECONDS = Gauge("reverie_sampler_model_load_seconds", "Seconds that loading took.", registry=REGISTRY)

for _source in ("drawn", "stored"):
    PICTURES.labels(_source)
for _outcome in ("made", "dropped"):
    PREVIEWS.labels(_outcome)
