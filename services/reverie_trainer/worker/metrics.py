"""Prometheus instruments of the training process."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram
from reverie.training.v1.job_pb2 import StepMetrics
from reverie_common.telemetry.metrics import REGISTRY

STEP_BUCKETS_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

STEPS = Counter("reverie_worker_steps", "Optimiser steps done by this process.", registry=REGISTRY)
STEP_SECONDS = Histogram(
    "reverie_worker_step_seconds", "Seconds of an optimiser step.", buckets=STEP_BUCKETS_SECONDS, registry=REGISTRY
)
DATA_WAIT_SECONDS = Counter(
    "reverie_worker_data_wait_seconds", "Seconds that steps waited for data.", registry=REGISTRY
)
LOSS = Gauge("reverie_worker_loss", "Loss of the newest step.", registry=REGISTRY)
LEARNING_RATE = Gauge("reverie_worker_learning_rate", "Learning rate of the newest step.", registry=REGISTRY)
GRADIENT_NORM = Gauge("reverie_worker_gradient_norm", "Gradient norm of the newest step.", registry=REGISTRY)
GRADIENT_ABSMAX = Gauge(
    "reverie_worker_gradient_absmax", "Largest gradient element of the newest step, before clipping.", registry=REGISTRY
)
LOAD_BALANCING_LOSS = Gauge(
    "reverie_worker_load_balancing_loss",
    "Load-balancing loss of the newest step before its weight; 1 is a perfect balance, 0 says that it is off.",
    registry=REGISTRY,
)
REGULARISATION_LOSS = Gauge(
    "reverie_worker_regularisation_loss",
    "Loss of the regularisation samples, of the newest step that had any.",
    registry=REGISTRY,
)
EXPERT_LOAD = Gauge(
    "reverie_worker_expert_load",
    "Share of the routed tokens that an expert got in the newest step, mean over the layers.",
    ("expert",),
    registry=REGISTRY,
)
ROUTER_ENTROPY = Gauge(
    "reverie_worker_router_entropy_nats",
    "Entropy of the router's scores in the newest step, mean over tokens and layers.",
    registry=REGISTRY,
)
ROLLOUT_SHARE = Gauge(
    "reverie_worker_rollout_share", "Share of the newest step's samples that were rolled out.", registry=REGISTRY
)
CHECKPOINTS = Counter(
    "reverie_worker_checkpoints", "Checkpoints by what became of them.", ("outcome",), registry=REGISTRY
)
CACHE_BYTES = Gauge("reverie_worker_cache_bytes", "Embeddings and latents in memory.", registry=REGISTRY)

for _outcome in ("saved", "failed"):
    CHECKPOINTS.labels(_outcome)


def observe_step(figures: StepMetrics) -> None:
    """Count one optimiser step."""
    STEPS.inc()
    STEP_SECONDS.observe(figures.step_seconds)
    DATA_WAIT_SECONDS.inc(figures.data_wait_seconds)
    LOSS.set(figures.loss)
    LEARNING_RATE.set(figures.learning_rate)
    GRADIENT_NORM.set(figures.gradient_norm)
    GRADIENT_ABSMAX.set(figures.gradient_absmax)
    LOAD_BALANCING_LOSS.set(figures.load_balancing_loss)
    ROUTER_ENTROPY.set(figures.router_entropy)
    ROLLOUT_SHARE.set(figures.rollout_share)
    if figures.HasField("regularisation_loss"):
        REGULARISATION_LOSS.set(figures.regularisation_loss)
    for expert, load in enumerate(figures.expert_load):
        EXPERT_LOAD.labels(str(expert)).set(load)
