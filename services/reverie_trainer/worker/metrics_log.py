"""The figures of every step so far, as `metrics.jsonl`; saved with each checkpoint, so that a resume loses none."""

from __future__ import annotations

import json
from collections.abc import Iterator

from reverie.training.v1.job_pb2 import StepMetrics

FIELDS = (
    "step",
    "loss",
    "learning_rate",
    "gradient_norm",
    "step_seconds",
    "data_wait_seconds",
    "gradient_absmax",
    "epoch",
)
OPTIONAL_FIELDS = ("load_balancing_loss", "regularisation_loss", "router_entropy", "rollout_share")


class MetricsLog:
    """Grows by one JSON object a line."""

    def __init__(self, lines: bytes = b"") -> None:
        """Continue what `lines` holds."""
        self._lines = [line for line in lines.split(b"\n") if line]

    def add(self, metrics: StepMetrics) -> None:
        """Add a step."""
        values = {name: getattr(metrics, name) for name in FIELDS}
        given = {field.name for field, _ in metrics.ListFields()}
        values.update((name, getattr(metrics, name)) for name in OPTIONAL_FIELDS if name in given)
        if metrics.expert_load:
            values["expert_load"] = list(metrics.expert_load)
        self._lines.append(json.dumps(values).encode())

    def after(self, step: int) -> Iterator[StepMetrics]:
        """Yield the figures of every step after one."""
        for line in self._lines:
            values = json.loads(line)
            if values["step"] > step:
                yield StepMetrics(**values)

    def body(self) -> bytes:
        """The file."""
        return b"".join(line + b"\n" for line in self._lines)
