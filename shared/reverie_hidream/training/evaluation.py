"""The stable evaluation loss: fixed timesteps, fixed images, noise by image (spec 7.6).

Measured twice with the same weights it gives the same digits, and it neither reads nor moves any random state. It is
the mean squared error of the velocity whatever loss the job trains with, without masks and without dropout.

B batch, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import diffusers
import torch

from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.flow import noisy_latents, sample_losses, schedule_sigmas, timesteps_of, velocity_target
from reverie_hidream.randomness import Draw
from reverie_hidream.training.objective import ObjectiveSettings
from reverie_hidream.transformer import predict_velocity


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationBatch:
    """Images of one size that are measured together, on the CPU."""

    latents: torch.Tensor
    """(B, C, h, w) float32, scaled; the mean of the posterior, which leaves nothing to chance."""
    noise: torch.Tensor
    """(B, C, h, w) float32, see `evaluation_noise`."""
    conditioning: TextConditioning

    def to(self, device: torch.device, dtype: torch.dtype) -> EvaluationBatch:
        """The same on a device, the embeddings in the dtype of the model."""
        return EvaluationBatch(
            latents=self.latents.to(device),
            noise=self.noise.to(device),
            conditioning=self.conditioning.to(device, dtype),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TimestepLoss:
    """The loss at one timestep."""

    timestep: float
    """0 to 1000."""
    loss: float
    """Mean over the images that were measured there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One measurement."""

    loss: float
    """Mean over all images and timesteps."""
    timesteps: tuple[TimestepLoss, ...]
    """From noise to image. With the automatic shift, images of other sizes have timesteps of their own."""


def evaluation_noise(image_sha256: str, shape: Sequence[int]) -> torch.Tensor:
    """The noise of an image: a function of its content alone. (C, h, w) float32."""
    return torch.from_numpy(Draw(seed=0, stream=f"evaluation/{image_sha256}").normal(0, 0, shape))


@torch.no_grad()
def evaluate(
    transformer: diffusers.HiDreamImageTransformer2DModel,
    batches: Iterable[EvaluationBatch],
    settings: ObjectiveSettings,
    *,
    num_timesteps: int = 28,
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Measure the loss. Blocks for one forward pass for each batch and timestep.

    Args:
        batches: always in the same order; the last digits depend on how images are put together.
        settings: of the job; only its shift counts.
        num_timesteps: 2 or more, from 1000 down to almost 0.
        on_progress: called with the number of forward passes done.

    Raises:
        ValueError: there is no batch.
    """
    device, dtype = transformer.x_embedder.proj.bias.device, transformer.x_embedder.proj.bias.dtype
    losses: dict[float, list[float]] = {}
    num_done = 0
    for given in batches:
        batch = given.to(device, dtype)
        sigmas = schedule_sigmas(num_timesteps, settings.shift_for(*batch.latents.shape[-2:]))
        measured = []
        for sigma in sigmas:
            measured.append(_losses_at(transformer, batch, sigma))
            num_done += 1
            if on_progress is not None:
                on_progress(num_done)
        for timestep, of_images in zip(timesteps_of(sigmas).tolist(), torch.stack(measured).tolist(), strict=True):
            losses.setdefault(timestep, []).extend(of_images)
    if not losses:
        raise ValueError("nothing to evaluate: there is no batch of images")
    curve = [TimestepLoss(timestep=timestep, loss=_mean(losses[timestep])) for timestep in sorted(losses, reverse=True)]
    return Evaluation(loss=_mean([loss for some in losses.values() for loss in some]), timesteps=tuple(curve))


def _losses_at(
    transformer: diffusers.HiDreamImageTransformer2DModel, batch: EvaluationBatch, sigma: torch.Tensor
) -> torch.Tensor:
    """(B,) on the model's device."""
    sigmas = sigma.to(batch.latents.device).expand(batch.latents.shape[0])
    noisy = noisy_latents(batch.latents, batch.noise, sigmas)
    velocity = predict_velocity(transformer, noisy, timesteps_of(sigmas), batch.conditioning)
    return sample_losses(velocity, velocity_target(batch.latents, batch.noise))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
