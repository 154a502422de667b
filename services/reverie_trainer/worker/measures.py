"""The stable evaluation loss during a job: when it is due, and telling what it was (spec 7.6)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from reverie.training.v1.measures_pb2 import EvaluationResult, TimestepLoss
from reverie_hidream.training.evaluation import Evaluation, EvaluationBatch

from reverie_trainer.jobs.preparing.epochs import EpochClock
from reverie_trainer.jobs.spec import Evaluation as EvaluationChoice
from reverie_trainer.worker.outbox import Outbox

ReadBatches = Callable[[str, int], Iterable[EvaluationBatch]]
"""Yields the first so many images of an evaluation dataset, always the same."""

Measure = Callable[[Iterable[EvaluationBatch], int], Evaluation]
"""Measures the loss of the present weights at so many timesteps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """Measures every evaluation dataset of a job."""

    choice: EvaluationChoice | None
    """None measures nothing."""
    datasets: tuple[str, ...]
    max_steps: int
    clock: EpochClock
    read_batches: ReadBatches
    outbox: Outbox

    def is_due(self, step: int) -> bool:
        """Whether the loss is wanted after a step; always before the first and after the last."""
        if self.choice is None:
            return False
        every = self.choice.every_steps
        is_end = step in (0, self.max_steps)
        return is_end or bool(every and step % every == 0) or self.clock.crosses(step, self.choice.every_epochs)

    def measure(self, step: int, measure: Measure, *, weights: str = "adapter") -> None:
        """Measure and report. Blocks for images x timesteps forward passes of each dataset.

        Raises:
            ReverieError: the store is away.
        """
        if self.choice is None:
            return
        begin = time.monotonic()
        for dataset in self.datasets:
            found = measure(self.read_batches(dataset, self.choice.num_images), self.choice.num_timesteps)
            self.outbox.evaluation(
                EvaluationResult(
                    step=step,
                    dataset=dataset,
                    loss=found.loss,
                    timesteps=[TimestepLoss(timestep=each.timestep, loss=each.loss) for each in found.timesteps],
                    weights=weights,
                )
            )
        self.outbox.phase("evaluate", time.monotonic() - begin)
