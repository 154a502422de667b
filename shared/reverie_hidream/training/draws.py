"""What chance decides for each sample, as pure functions of (seed, step, position) (design 6, spec 3.2).

B batch, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from reverie_hidream.flow import MIN_SIGMA, sample_sigmas, shift_sigma, unshift_sigma
from reverie_hidream.randomness import Draw
from reverie_hidream.training.batch import BatchDraws
from reverie_hidream.training.objective import (
    TIMESTEP_SAMPLINGS,
    ObjectiveSettings,
    RolloutSettings,
    perturbation_strength,
    rollout_offset,
    rollout_probability,
)

FAST_SIGMAS = (1.0,) * 7 + (0.75, 0.5, 0.25)
"""What `fast` draws from."""

UNSHIFTED_SAMPLINGS = ("fast", "custom")
"""Their noise levels are taken as they are given."""

_MAX_TIMESTEP = 1000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleDraws:
    """All random numbers of a job's objective. Thread-safe."""

    seed: int
    settings: ObjectiveSettings
    samples_per_step: int = 1
    """Samples in one optimiser step: what `round-robin` counts."""

    def draw(
        self, step: int, positions: Sequence[int], shape: tuple[int, ...], *, timestep_offset: float = 0.0
    ) -> BatchDraws:
        """Everything that chance decides for one micro-batch.

        Args:
            step: optimiser step, from 1.
            positions: places of the samples in the step's global batch, from 0.
            shape: (C, h, w) of the latents.
            timestep_offset: of the dataset, added to the normal number of `sigmoid` before the scale.
        """
        shift = self.settings.shift_for(*shape[-2:])
        sigmas = self._sigmas(step, positions, shift, timestep_offset)
        return BatchDraws(
            noise=torch.stack([self._noise(step, position, shape) for position in positions]),
            sigmas=sigmas,
            input_sigmas=self._input_sigmas(step, positions, sigmas),
            perturbation=self._perturbation(step, positions, shape),
            rollout_offsets=self._rollout_offsets(step, positions, unshift_sigma(sigmas, shift)),
            uses_mask=self._uses_mask(step, positions),
        )

    def _noise(self, step: int, position: int, shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.from_numpy(self._stream("noise").normal(step, position, shape))
        if not self.settings.offset_noise:
            return noise
        offsets = torch.from_numpy(self._stream("offset").normal(step, position, (shape[0], 1, 1)))
        return noise + self.settings.offset_noise * offsets

    def _sigmas(self, step: int, positions: Sequence[int], shift: float, timestep_offset: float) -> torch.Tensor:
        mode = self.settings.timestep_sampling
        if mode == "sigmoid":
            normal = self._normal_numbers(step, positions) + timestep_offset
            return sample_sigmas(normal, shift=shift, sigmoid_scale=self.settings.flow_sigmoid_scale)
        if mode == "custom":
            return torch.tensor([self._custom_level(step, position) for position in positions])
        if mode not in _LEVEL_OF_MODE:
            raise ValueError(f"timestep sampling {mode!r} is unknown; use one of {', '.join(TIMESTEP_SAMPLINGS)}")
        levels = [
            _LEVEL_OF_MODE[mode](self.settings, self._stream("timestep").generator(step, position))
            for position in positions
        ]
        return torch.tensor(levels) if mode in UNSHIFTED_SAMPLINGS else shift_sigma(torch.tensor(levels), shift)

    def _normal_numbers(self, step: int, positions: Sequence[int]) -> torch.Tensor:
        stream = self._stream("timestep")
        return torch.tensor([float(stream.normal(step, position, (1,))[0]) for position in positions])

    def _custom_level(self, step: int, position: int) -> float:
        levels = custom_sigmas(self.settings.flow_custom_timesteps)
        if self.settings.flow_timesteps_mode == "round-robin":
            return levels[((step - 1) * self.samples_per_step + position) % len(levels)]
        return levels[self._stream("timestep").integer(step, position, len(levels))]

    def _input_sigmas(self, step: int, positions: Sequence[int], sigmas: torch.Tensor) -> torch.Tensor | None:
        if self.settings.timestep_sampling != "mixflow":
            return None
        stream = self._stream("slowing")
        slowed = torch.tensor([stream.uniform(step, position) for position in positions])
        return sigmas + slowed * self.settings.mixflow_gamma * (1.0 - sigmas)

    def _perturbation(self, step: int, positions: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor | None:
        strength = perturbation_strength(step, self.settings)
        if not strength:
            return None
        stream = self._stream("perturbation")
        draws = [torch.from_numpy(stream.normal(step, position, shape)) for position in positions]
        return strength * torch.stack(draws)

    def _rollout_offsets(self, step: int, positions: Sequence[int], levels: torch.Tensor) -> tuple[int, ...]:
        rollout = self.settings.rollout
        if rollout is None:
            return ()
        probability = rollout_probability(step, rollout)
        return tuple(
            self._rollout_offset(step, position, probability, rollout, level)
            for position, level in zip(positions, levels.tolist(), strict=True)
        )

    def _rollout_offset(
        self, step: int, position: int, probability: float, rollout: RolloutSettings, level: float
    ) -> int:
        chance, length = self._stream("rollout").generator(step, position).random(2)
        if chance >= probability:
            return 0
        # Nothing is noisier than noise: close to it there are fewer steps to come from.
        steps_above = math.ceil((1.0 - level) / level_spacing(rollout.num_inference_steps) - 1e-6)
        return min(rollout_offset(float(length), rollout), steps_above)

    def _uses_mask(self, step: int, positions: Sequence[int]) -> tuple[bool, ...]:
        probability = self.settings.masked_loss_probability
        if probability >= 1.0:
            return ()
        stream = self._stream("mask")
        return tuple(stream.uniform(step, position) < probability for position in positions)

    def _stream(self, name: str) -> Draw:
        return Draw(seed=self.seed, stream=name)


def custom_sigmas(values: Sequence[float]) -> tuple[float, ...]:
    """The noise levels that a list means: as they are if all are in [0, 1], else they are timesteps in [0, 1000].

    Raises:
        ValueError: the list is empty, or a value is outside.
    """
    if not values:
        raise ValueError("timestep sampling `custom` needs flow_custom_timesteps; the list is empty")
    if not all(0.0 <= value <= _MAX_TIMESTEP for value in values):
        raise ValueError(f"flow_custom_timesteps {list(values)} are not all in 0 to {_MAX_TIMESTEP:g}")
    if all(value <= 1.0 for value in values):
        return tuple(values)
    return tuple(value / _MAX_TIMESTEP for value in values)


def level_spacing(num_inference_steps: int) -> float:
    """Distance of two noise levels of an inference schedule, before the shift."""
    return (1.0 - MIN_SIGMA) / (num_inference_steps - 1)


def _uniform_level(_: ObjectiveSettings, generator: np.random.Generator) -> float:
    return float(generator.random())


def _beta_level(settings: ObjectiveSettings, generator: np.random.Generator) -> float:
    return float(generator.beta(settings.flow_beta_schedule_alpha, settings.flow_beta_schedule_beta))


def _fast_level(_: ObjectiveSettings, generator: np.random.Generator) -> float:
    return FAST_SIGMAS[int(generator.integers(len(FAST_SIGMAS)))]


def _mixflow_level(_: ObjectiveSettings, generator: np.random.Generator) -> float:
    return 1.0 - math.sqrt(generator.random())


_LEVEL_OF_MODE: Mapping[str, Callable[[ObjectiveSettings, np.random.Generator], float]] = {
    "uniform": _uniform_level,
    "beta": _beta_level,
    "fast": _fast_level,
    "mixflow": _mixflow_level,
}
