"""What chance decides for each sample, as pure functions of (seed, step, position) (design 6, spec 3.2).

B batch, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reverie_hidream.flow import sample_sigmas
from reverie_hidream.randomness import Draw
from reverie_hidream.training.batch import BatchDraws
from reverie_hidream.training.objective import ObjectiveSettings


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
            timestep_offset: of the dataset, added to the normal number before the scale.
        """
        return BatchDraws(
            noise=torch.stack([self._noise(step, position, shape) for position in positions]),
            sigmas=self._sigmas(step, positions, shape, timestep_offset),
        )

    def _noise(self, step: int, position: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(self._stream("noise").normal(step, position, shape))

    def _sigmas(
        self, step: int, positions: Sequence[int], shape: tuple[int, ...], timestep_offset: float
    ) -> torch.Tensor:
        stream = self._stream("timestep")
        normal = torch.tensor([float(stream.normal(step, position, (1,))[0]) for position in positions])
        return sample_sigmas(
            normal + timestep_offset,
            shift=self.settings.shift_for(*shape[-2:]),
            sigmoid_scale=self.settings.flow_sigmoid_scale,
        )

    def _stream(self, name: str) -> Draw:
        return Draw(seed=self.seed, stream=name)
