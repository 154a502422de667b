"""A running average of an adapter's parameters, in float32 (spec 5.7).

In bfloat16 the average would stop following: a two-hundredth of a difference is soon less than half of what the last
digit of the average is worth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaSettings:
    """How the average moves."""

    decay: float = 0.995
    """Weight of the past once the average has settled."""
    update_interval: int = 1
    """Optimiser steps between two updates."""
    warmup_steps: int = 0
    """Before this step the average is a copy; from it on, the full decay holds. 0: the decay rises by itself."""

    def __post_init__(self) -> None:
        """Refuse what is no average.

        Raises:
            ValueError: decay outside 0 to below 1, an interval below 1, or negative warm-up.
        """
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"EMA decay {self.decay} is outside 0 to below 1")
        if self.update_interval < 1:
            raise ValueError(f"EMA update interval {self.update_interval} is below 1")
        if self.warmup_steps < 0:
            raise ValueError(f"EMA warm-up of {self.warmup_steps} steps is below 0")


def ema_decay_at(step: int, settings: EmaSettings) -> float:
    """Weight of the past in the update after a step.

    Without warm-up min(decay, (1 + k) / (10 + k)) with k = step - 1, and 0, a copy, after the first step; with warm-up
    0 before step `warmup_steps` and the full decay from there on.

    Args:
        step: optimiser steps done, from 1.
    """
    if settings.warmup_steps:
        return 0.0 if step < settings.warmup_steps else settings.decay
    num_before = max(0, step - 1)
    return min(settings.decay, (1 + num_before) / (10 + num_before)) if num_before else 0.0


class Ema:
    """Shadows of all trainable tensors of an adapter, LoKr's scalars included, on its device. Owned by one thread."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: EmaSettings) -> None:
        """Begin with a copy.

        Args:
            parameters: the adapter's, by name.
        """
        self._parameters = dict(parameters)
        self._settings = settings
        self._shadows = {name: _copy_of(parameter) for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters, if it is the step's turn.

        Args:
            step: optimiser steps done, from 1.
        """
        if step % self._settings.update_interval:
            return
        current = [parameter.detach().float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._shadows.values()), current, 1.0 - ema_decay_at(step, self._settings))

    def restart(self) -> None:
        """Begin again with a copy of what the parameters are now."""
        self._shadows = {name: _copy_of(parameter) for name, parameter in self._parameters.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of the shadows on the CPU, float32, by name: what a resume needs besides the step."""
        return {name: shadow.cpu().clone() for name, shadow in self._shadows.items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up what `state` gave.

        Raises:
            ValueError: other names or shapes: it is of another adapter. Nothing is changed.
        """
        if missing := sorted(self._shadows.keys() ^ state.keys()):
            raise ValueError(
                f"the saved average is of another adapter: {len(missing)} names differ, {missing[0]} first"
            )
        for name, shadow in self._shadows.items():
            if shadow.shape != state[name].shape:
                raise ValueError(
                    f"saved average of {name} has shape {tuple(state[name].shape)}, not {tuple(shadow.shape)}"
                )
        self._shadows = {
            name: state[name].to(device=shadow.device, dtype=torch.float32, copy=True)
            for name, shadow in self._shadows.items()
        }

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Hold the average in the parameters, to export or to measure it; the parameters come back whatever happens."""
        before = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            self._write(self._shadows)
            yield
        finally:
            self._write(before)

    @torch.no_grad()
    def _write(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])


def _copy_of(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.detach().to(torch.float32, copy=True)
