"""Scheduled sampling: the model makes its own noisy input from an earlier, noisier one (spec 9).

A picture is drawn in steps of an inference schedule; before the shift its noise levels lie a fixed spacing apart. A
sample that is trained at some level and rolled out for k steps starts k spacings above that level, from latents and
noise mixed as always, and takes k steps of the solver down to exactly its own level, with the adapter on and without
gradients. So training sees what the model will see when it draws, and the distribution of the noise levels stays.

B batch, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from reverie_hidream.flow import noisy_latents, shift_sigma, unshift_sigma
from reverie_hidream.training.draws import level_spacing
from reverie_hidream.training.objective import ROLLOUT_SAMPLERS, RolloutSettings

Velocity = Callable[[torch.Tensor, torch.Tensor, Sequence[int]], torch.Tensor]
"""Velocity of noisy latents at noise levels, for the samples at these places of the batch."""


def rollout_levels(
    sigmas: torch.Tensor, offsets: Sequence[int], *, shift: float, num_inference_steps: int
) -> torch.Tensor:
    """Noise levels of a roll-out, from each sample's own upwards. (1 + longest offset, B), float32.

    Args:
        sigmas: (B,), shifted.
        offsets: steps that each sample is rolled out for; a sample's entries beyond its offset have no meaning.
    """
    own = sigmas.to(torch.promote_types(sigmas.dtype, torch.float32))
    steps = torch.arange(max(offsets) + 1, dtype=own.dtype, device=own.device)
    above = unshift_sigma(own, shift) + steps[:, None] * level_spacing(num_inference_steps)
    levels = shift_sigma(above.clamp(max=1.0), shift)
    # The way down ends where training begins, to the last bit.
    levels[0] = own
    return levels


@torch.no_grad()
def roll_out(
    velocity: Velocity,
    latents: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    offsets: Sequence[int],
    *,
    shift: float,
    settings: RolloutSettings,
) -> torch.Tensor:
    """The noisy inputs of a batch, rolled out where `offsets` is above 0. Blocks for max(offsets) steps of the solver.

    Args:
        latents: (B, C, h, w). noise: the same; what the input's noise is made of.
        sigmas: (B,), shifted.

    Returns:
        (B, C, h, w) float32: samples with offset 0 as `noisy_latents` makes them.

    Raises:
        ValueError: the solver is unknown.
    """
    if settings.sampler not in ROLLOUT_SAMPLERS:
        raise ValueError(f"roll-out sampler {settings.sampler!r} is unknown; use one of {', '.join(ROLLOUT_SAMPLERS)}")
    levels = rollout_levels(sigmas, offsets, shift=shift, num_inference_steps=settings.num_inference_steps)
    starts = torch.stack([levels[offset, index] for index, offset in enumerate(offsets)])
    noisy = noisy_latents(latents, noise, starts)
    for above in range(max(offsets), 0, -1):
        active = [index for index, offset in enumerate(offsets) if offset >= above]
        begin, end = levels[above, active], levels[above - 1, active]
        noisy[active] = _step(velocity, noisy[active], begin, end, active, is_heun=settings.sampler == "heun")
    return noisy


def _step(
    velocity: Velocity,
    noisy: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    active: Sequence[int],
    *,
    is_heun: bool,
) -> torch.Tensor:
    length = (end - begin).view(-1, 1, 1, 1)
    slope = velocity(noisy, begin, active)
    if is_heun:
        slope = 0.5 * (slope + velocity(noisy + length * slope, end, active))
    return noisy + length * slope
