"""Learning rate of every step, as a pure function of the step (spec 5.5).

Every schedule warms up first: linearly from 0, and the warm-up is no period of anything. What a schedule does after it
begins at the full rate in the step after the warm-up, and is at its end one step after the last.
"""

from __future__ import annotations

import math

from reverie_common.optimizer_catalogue import CONSTANT_SCHEDULES, SCHEDULES


def learning_rate_at(
    schedule: str,
    step: int,
    *,
    learning_rate: float,
    warmup_steps: int = 0,
    max_steps: int = 0,
    end: float = 0.0,
    power: float = 0.8,
    num_cycles: int = 1,
) -> float:
    """Learning rate of a step.

    Linear from 0 over the warm-up: step 1 has 1 / warmup_steps of the rate, step `warmup_steps` all of it. Afterwards
    `end + (learning_rate - end) * f(p)`, where p runs from 0 to 1 over the steps that are left and f(p) is

    * constant, constant_with_warmup: 1, whatever `end` is
    * linear: 1 - p; polynomial: (1 - p) ** power
    * cosine: (1 + cos(pi p)) / 2; cosine_with_restarts: the same, `num_cycles` times over, each from the full rate
    * sine: (1 + cos(pi p (2 num_cycles - 1))) / 2, smoothly down to `end` `num_cycles` times, and up in between

    Args:
        step: from 1.
        max_steps: steps of the whole job; constant schedules need none.

    Raises:
        ValueError: unknown schedule, or a step before the first.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"learning-rate schedule {schedule!r} is unknown; use one of {', '.join(SCHEDULES)}")
    if step < 1:
        raise ValueError(f"step {step} is before the first, which is 1")
    if step <= warmup_steps:
        return learning_rate * step / warmup_steps
    if schedule in CONSTANT_SCHEDULES:
        return learning_rate
    progress = min(1.0, (step - 1 - warmup_steps) / max(1, max_steps - warmup_steps))
    return end + (learning_rate - end) * _factor(schedule, progress, power=power, num_cycles=num_cycles)


def _factor(schedule: str, progress: float, *, power: float, num_cycles: int) -> float:
    """How much is left of a schedule, 1 to 0, when `progress` of it, 0 to 1, is over."""
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "polynomial":
        return float((1.0 - progress) ** power)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "cosine_with_restarts":
        # The end of the last cycle is an end, not the next one's beginning.
        within = math.fmod(progress * num_cycles, 1.0) if progress < 1.0 else 1.0
        return 0.5 * (1.0 + math.cos(math.pi * within))
    # Half a wave more down than up, so that it ends at its end.
    return 0.5 * (1.0 + math.cos(math.pi * progress * (2 * num_cycles - 1)))
