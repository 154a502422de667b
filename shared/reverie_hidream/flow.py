"""Flow matching: noise levels, noisy latents, target and loss (spec 3).

sigma is the noise level in [0, 1], 1 being pure noise; the timestep that the network is told is 1000 * sigma.
Everything here is computed in float32 (float64 stays float64): a bfloat16 sigma has 3 significant digits.
"""

from __future__ import annotations

import math

import torch

TIMESTEP_SCALE = 1000.0
"""Timestep of sigma 1 (spec 0.1, decision 2)."""

MIN_SIGMA = 0.001
"""Last noise level of a schedule, before the shift."""

BASE_TOKENS, MAX_TOKENS = 256, 4096
BASE_MU, MAX_MU = 0.5, 1.15


def shift_sigma(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """Move noise levels towards noise: shift * sigma / (1 + (shift - 1) * sigma) (spec 3.3).

    Raises:
        ValueError: `shift` is not a positive finite number.
    """
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"flow schedule shift {shift} is not a positive number; 1.0 leaves the levels as they are")
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def unshift_sigma(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """Undo `shift_sigma`: the level that becomes `sigmas` by this shift."""
    return sigmas / (shift - (shift - 1.0) * sigmas)


def schedule_sigmas(num_steps: int, shift: float) -> torch.Tensor:
    """Noise levels of a picture in so many steps: 1 to 0.001 in equal steps, then the shift (spec 7.6).

    The last step, to 0, is not among them. The same as diffusers' FlowMatchEulerDiscreteScheduler whose sigma_min is
    0.001 before the shift.

    Args:
        num_steps: 2 or more.

    Returns:
        (num_steps,) float32, falling.
    """
    if num_steps < 2:
        raise ValueError(f"a schedule of {num_steps} steps has no spacing; use 2 or more")
    return shift_sigma(torch.linspace(1.0, MIN_SIGMA, num_steps, dtype=torch.float64), shift).float()


def automatic_mu(num_tokens: int) -> float:
    """mu of a latent with so many patch tokens, unpadded: 0.5 at 256 tokens, 1.15 at 4096 (spec 3.3)."""
    slope = (MAX_MU - BASE_MU) / (MAX_TOKENS - BASE_TOKENS)
    return BASE_MU + slope * (num_tokens - BASE_TOKENS)


def automatic_shift(latent_height: int, latent_width: int, *, patch_size: int = 2) -> float:
    """Shift that suits a latent of this size: exp(mu), 3.158 at 1024 x 1024 pixels (spec 3.3)."""
    return math.exp(automatic_mu((latent_height // patch_size) * (latent_width // patch_size)))


def sample_sigmas(normal_draws: torch.Tensor, *, shift: float = 3.0, sigmoid_scale: float = 1.0) -> torch.Tensor:
    """Noise levels for training: sigmoid(scale * draw), then the shift (spec 3.2).

    Args:
        normal_draws: (B,) standard normal.
    """
    return shift_sigma(torch.sigmoid(sigmoid_scale * _at_least_float32(normal_draws)), shift)


def timesteps_of(sigmas: torch.Tensor) -> torch.Tensor:
    """What the network is told: 1000 * sigma, not rounded (spec 0.1, decision 2)."""
    return sigmas * TIMESTEP_SCALE


def noisy_latents(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """(1 - sigma) * latents + sigma * noise (spec 3.1).

    Args:
        latents: (B, C, h, w), scaled.
        noise: like `latents`, standard normal.
        sigmas: (B,).
    """
    levels = _at_least_float32(sigmas).view(-1, *[1] * (latents.ndim - 1))
    return (1.0 - levels) * _at_least_float32(latents) + levels * _at_least_float32(noise)


def velocity_target(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What the prediction is compared with: noise - latents (spec 3.1)."""
    return _at_least_float32(noise) - _at_least_float32(latents)


def sample_losses(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample over its pixels; the loss of a batch is their mean (spec 3.1). (B,)"""
    difference = _at_least_float32(prediction) - _at_least_float32(target)
    return difference.square().flatten(1).mean(dim=1)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
