"""How steps and epochs go together, where datasets may come and go at certain steps: pure functions (spec 6.5).

The datasets that are used at a step are its pool. Whenever the pool changes a new epoch begins, and an epoch shows
every sample of the pool, repeats included. Without start_step and end_step there is one pool for the whole job.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRange:
    """The optimiser steps at which a dataset is used, from 1."""

    first: int = 1
    last: int | None = None
    """None is to the end."""

    def __contains__(self, step: int) -> bool:
        """Whether a step is one of them."""
        return self.first <= step and (self.last is None or step <= self.last)

    def __str__(self) -> str:
        """The steps as people read them."""
        if self.last is None:
            return "all" if self.first == 1 else f"from {self.first}"
        return f"{self.first} to {self.last}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Steps of one pool."""

    steps: StepRange
    pool: tuple[int, ...]
    """Indices of the ranges that hold these steps; empty where none does."""

    def num_steps_until(self, step: int) -> int:
        """Steps of this phase up to and with a step."""
        last = step if self.steps.last is None else min(step, self.steps.last)
        return max(0, last - self.steps.first + 1)


def phases_of(ranges: Sequence[StepRange]) -> list[Phase]:
    """Return the phases of a job in order, from step 1; the last one has no end."""
    firsts = {1, *(item.first for item in ranges), *(item.last + 1 for item in ranges if item.last is not None)}
    ordered = sorted(firsts)
    ends: list[int | None] = [*(first - 1 for first in ordered[1:]), None]
    return [
        Phase(
            steps=StepRange(first=first, last=last),
            pool=tuple(index for index, item in enumerate(ranges) if first in item),
        )
        for first, last in zip(ordered, ends, strict=True)
    ]


def steps_without_data(ranges: Sequence[StepRange], max_steps: int) -> StepRange | None:
    """Return the first steps of a job of `max_steps` at which no dataset is used, None where there are none."""
    for phase in phases_of(ranges):
        if not phase.pool and phase.steps.first <= max_steps:
            last = phase.steps.last
            return StepRange(first=phase.steps.first, last=max_steps if last is None else min(last, max_steps))
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochClock:
    """Turns steps into epochs and back."""

    ranges: Sequence[StepRange]
    """When each trained dataset is used."""
    num_batches: Sequence[int]
    """Micro-batches that an epoch takes of each, in the same order."""
    num_accumulated: int = 1
    """Micro-batches in one optimiser step."""
    _phases: Sequence[Phase] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Find the phases once."""
        object.__setattr__(self, "_phases", phases_of(self.ranges))

    def epoch_at(self, step: int) -> float:
        """Return the epochs done after a step, with the fraction; 0 before the first step."""
        return float(self._epochs(step))

    def crosses(self, step: int, every_epochs: float) -> bool:
        """Whether this step completes another multiple of `every_epochs`; never where that is 0."""
        if every_epochs <= 0 or step < 1:
            return False
        every = Fraction(every_epochs).limit_denominator(1_000_000)
        return self._epochs(step) // every > self._epochs(step - 1) // every

    def steps_for(self, num_epochs: float) -> int:
        """Return the first step after which `num_epochs` epochs are done.

        Raises:
            ValueError: the datasets end before that.
        """
        left = Fraction(num_epochs).limit_denominator(1_000_000)
        for phase in self._phases:
            batches = self._batches_of(phase)
            if not batches:
                continue
            needed = math.ceil(left * batches / self.num_accumulated)
            if phase.steps.last is None or needed <= phase.num_steps_until(phase.steps.last):
                return phase.steps.first - 1 + needed
            left -= Fraction(phase.num_steps_until(phase.steps.last) * self.num_accumulated, batches)
        raise ValueError(f"the datasets end {float(left):.3g} epochs before epoch {num_epochs:g}")

    def _epochs(self, step: int) -> Fraction:
        done = Fraction(0)
        for phase in self._phases:
            batches = self._batches_of(phase)
            if batches:
                done += Fraction(phase.num_steps_until(step) * self.num_accumulated, batches)
        return done

    def _batches_of(self, phase: Phase) -> int:
        return sum(self.num_batches[index] for index in phase.pool)
