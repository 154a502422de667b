"""What the worker has to tell the trainer, collected from all threads until the next report."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from google.protobuf.timestamp_pb2 import Timestamp
from reverie.common.v1.common_pb2 import ObjectRef
from reverie.training.v1.job_pb2 import (
    NOTICE_SEVERITY_INFO,
    NOTICE_SEVERITY_WARNING,
    AdapterReport,
    Checkpoint,
    JobNotice,
    PhaseTime,
    StepMetrics,
    TrainingJobEvent,
    ValidationImage,
    ValidationPreview,
    ValidationProgress,
    ValidationScores,
)
from reverie.training.v1.measures_pb2 import EvaluationResult

MAX_EVENTS = 1000
"""Events in one report: some 300 bytes each, far below the message limit of 4 MiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What one report says."""

    events: tuple[TrainingJobEvent, ...] = ()
    phases: tuple[PhaseTime, ...] = ()
    adapter: AdapterReport | None = None

    def __bool__(self) -> bool:
        """Whether it says anything."""
        return bool(self.events or self.phases or self.adapter)


class Outbox:
    """Thread-safe. Bounded in that training ends when the trainer is away for too long."""

    def __init__(self) -> None:
        """Start with nothing to tell."""
        self._lock = threading.Lock()
        self._events: deque[TrainingJobEvent] = deque()
        self._phases: dict[str, float] = {}
        self._adapter: AdapterReport | None = None

    def step(self, metrics: StepMetrics) -> None:
        """A training step was done."""
        self._add(TrainingJobEvent(step=metrics))

    def checkpoint(self, *, step: int, adapter: ObjectRef, state: ObjectRef) -> None:
        """A checkpoint can be resumed from."""
        event = TrainingJobEvent(checkpoint=Checkpoint(step=step, adapter=adapter, state=state))
        event.checkpoint.create_time.CopyFrom(_now())
        self._add(event)

    def image(self, image: ValidationImage) -> None:
        """A validation picture is there."""
        self._add(TrainingJobEvent(validation_image=image))

    def preview(self, preview: ValidationPreview) -> None:
        """A validation picture is on its way."""
        self._add(TrainingJobEvent(validation_preview=preview))

    def scores(self, scores: ValidationScores) -> None:
        """The pictures of a step were scored."""
        self._add(TrainingJobEvent(validation_scores=scores))

    def evaluation(self, result: EvaluationResult) -> None:
        """The loss on an evaluation dataset was measured."""
        self._add(TrainingJobEvent(evaluation=result))

    def validation_progress(self, *, step: int, num_done: int, num_total: int) -> None:
        """The sampler moved on."""
        progress = ValidationProgress(step=step, num_done=num_done, num_total=num_total)
        self._add(TrainingJobEvent(validation_progress=progress))

    def inform(self, reason: str, message: str) -> None:
        """Something is good to know."""
        self._add(TrainingJobEvent(notice=JobNotice(severity=NOTICE_SEVERITY_INFO, reason=reason, message=message)))

    def warn(self, reason: str, message: str) -> None:
        """Something was lost or is not as asked for."""
        self._add(TrainingJobEvent(notice=JobNotice(severity=NOTICE_SEVERITY_WARNING, reason=reason, message=message)))

    def adapter(self, *, num_modules: int, num_parameters: int) -> None:
        """The adapter is attached."""
        with self._lock:
            self._adapter = AdapterReport(num_modules=num_modules, num_parameters=num_parameters)

    def phase(self, name: str, seconds: float) -> None:
        """Time was spent in a phase."""
        with self._lock:
            self._phases[name] = self._phases.get(name, 0.0) + seconds

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time that the block takes to a phase, however it ends."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.phase(phase, time.monotonic() - begin)

    def take(self) -> Report:
        """Remove and return what the next report says."""
        with self._lock:
            events = tuple(self._events.popleft() for _ in range(min(MAX_EVENTS, len(self._events))))
            phases = tuple(PhaseTime(name=name, seconds=seconds) for name, seconds in self._phases.items())
            adapter, self._adapter, self._phases = self._adapter, None, {}
        return Report(events=events, phases=phases, adapter=adapter)

    def _add(self, event: TrainingJobEvent) -> None:
        event.time.CopyFrom(_now())
        with self._lock:
            self._events.append(event)


def _now() -> Timestamp:
    timestamp = Timestamp()
    timestamp.GetCurrentTime()
    return timestamp
