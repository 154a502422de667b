"""What a job trains towards: settings, and pure functions of tensors (spec 3).

B batch, C latent channels, h x w latent pixels. sigma is the noise level in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from reverie_hidream.flow import automatic_shift

TIMESTEP_SAMPLINGS = ("sigmoid", "uniform", "beta", "fast", "custom", "mixflow")
CUSTOM_ORDERS = ("random", "round-robin")
LOSS_TYPES = ("l2", "huber", "smooth_l1")
HUBER_SCHEDULES = ("snr", "exponential", "constant")
MASK_TYPES = ("none", "mask", "segmentation")
RAMP_SHAPES = ("linear", "cosine")
ROLLOUT_STRATEGIES = ("uniform", "biased_early", "biased_late")
ROLLOUT_SAMPLERS = ("euler", "heun")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReflexflowSettings:
    """ReflexFlow's weights, for rolled-out samples alone (spec 9)."""

    alpha: float = 1.0
    """Of the exposure bias in the element-wise weight."""
    beta1: float = 10.0
    """Of the direction term."""
    beta2: float = 1.0
    """Of the velocity term."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutSettings:
    """When and how far the model makes its own input (spec 9)."""

    max_step_offset: int
    """Steps of the inference schedule, 1 or more."""
    probability: float = 0.0
    """That a sample is rolled out, where there is no ramp."""
    prob_start: float = 0.0
    """Before the ramp."""
    prob_end: float = 0.5
    """After the ramp."""
    ramp_steps: int = 0
    """Optimiser steps; 0 is no ramp."""
    ramp_shape: str = "linear"
    start_step: int = 0
    """First optimiser step of the ramp."""
    strategy: str = "uniform"
    num_inference_steps: int = 30
    """Steps of the schedule that the spacing is taken from."""
    sampler: str = "euler"
    reflexflow: ReflexflowSettings | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveSettings:
    """How noise levels, inputs, targets and losses are made; names as in a job's optimization."""

    timestep_sampling: str = "sigmoid"
    flow_sigmoid_scale: float = 1.0
    flow_schedule_shift: float = 3.0
    flow_schedule_auto_shift: bool = False
    flow_beta_schedule_alpha: float = 2.0
    flow_beta_schedule_beta: float = 2.0
    flow_custom_timesteps: tuple[float, ...] = ()
    flow_timesteps_mode: str = "random"
    mixflow_gamma: float = 0.8
    loss_type: str = "l2"
    huber_c: float = 0.1
    huber_schedule: str = "snr"
    input_perturbation: float = 0.0
    input_perturbation_steps: int = 0
    offset_noise: float = 0.0
    masked_loss_probability: float = 1.0
    masked_loss_normalise_area: bool = False
    use_load_balancing_loss: bool = False
    load_balancing_loss_weight: float = 0.01
    rollout: RolloutSettings | None = None

    def shift_for(self, latent_height: int, latent_width: int) -> float:
        """Shift of the noise schedule for latents of this size, unpadded (spec 3.3)."""
        if self.flow_schedule_auto_shift:
            return automatic_shift(latent_height, latent_width)
        return self.flow_schedule_shift


def huber_threshold(sigmas: torch.Tensor, settings: ObjectiveSettings) -> torch.Tensor:
    """Where huber and smooth_l1 turn from square to linear, by noise level (spec 3.4). (B,)

    Args:
        sigmas: (B,), at least float32.

    Raises:
        ValueError: the schedule is unknown.
    """
    if settings.huber_schedule == "constant":
        return torch.full_like(sigmas, settings.huber_c)
    if settings.huber_schedule == "exponential":
        return settings.huber_c**sigmas
    if settings.huber_schedule == "snr":
        signal_to_noise = ((1.0 - sigmas) / (sigmas + 1e-4)).clamp(min=0.0).sqrt()
        return (1.0 - settings.huber_c) / (1.0 + signal_to_noise).square() + settings.huber_c
    raise ValueError(f"huber schedule {settings.huber_schedule!r} is unknown; use one of {', '.join(HUBER_SCHEDULES)}")


def pixel_losses(
    prediction: torch.Tensor, target: torch.Tensor, sigmas: torch.Tensor, settings: ObjectiveSettings
) -> torch.Tensor:
    """Loss of every latent pixel, at least float32 (spec 3.4). (B, C, h, w)

    With d the difference and c the threshold: l2 is d^2, huber 2 c (sqrt(d^2 + c^2) - c), smooth_l1 the same without
    the factor c.

    Args:
        prediction: (B, C, h, w). target: the same.
        sigmas: (B,).

    Raises:
        ValueError: the loss is unknown.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    square = (prediction.to(dtype) - target.to(dtype)).square()
    if settings.loss_type == "l2":
        return square
    if settings.loss_type not in LOSS_TYPES:
        raise ValueError(f"loss {settings.loss_type!r} is unknown; use one of {', '.join(LOSS_TYPES)}")
    threshold = huber_threshold(sigmas.to(dtype), settings).view(-1, *[1] * (square.ndim - 1))
    # sqrt(d^2 + c^2) - c, without the cancellation where d is small.
    excess = square / ((square + threshold.square()).sqrt() + threshold)
    return 2.0 * excess * threshold if settings.loss_type == "huber" else 2.0 * excess


def mask_weights(masks: torch.Tensor, mask_type: str, uses_mask: Sequence[bool]) -> torch.Tensor:
    """Weight of every latent pixel: the mask, or of a segmentation everything above 0 as 1 (spec 3.6).

    Args:
        masks: (B, 1, h, w), 0 to 1.
        uses_mask: which samples' segmentations apply, the others weigh every pixel alike; empty is all of them.
    """
    if mask_type != "segmentation":
        return masks
    weights = (masks > 0).to(masks.dtype)
    if not uses_mask or all(uses_mask):
        return weights
    applies = torch.tensor(uses_mask, device=masks.device).view(-1, 1, 1, 1)
    return torch.where(applies, weights, torch.ones_like(weights))


def mean_losses(losses: torch.Tensor, weights: torch.Tensor | None = None, *, by_area: bool = False) -> torch.Tensor:
    """Mean of each sample's pixel losses. (B,)

    Args:
        losses: (B, C, h, w).
        weights: (B, 1, h, w).
        by_area: divide by the sum of the weights and not by the number of pixels; a sample without any weight has no
            loss.
    """
    if weights is None:
        return losses.flatten(1).mean(dim=1)
    means = (losses * weights.to(losses.dtype)).flatten(1).mean(dim=1)
    if not by_area:
        return means
    area = weights.to(losses.dtype).flatten(1).mean(dim=1)
    return torch.where(area > 0, means / area.clamp(min=torch.finfo(area.dtype).tiny), torch.zeros_like(means))


def perturbation_strength(step: int, settings: ObjectiveSettings) -> float:
    """Strength of the input's extra noise: all of it at step 1, falling linearly to 0 (spec 3.4)."""
    if not settings.input_perturbation_steps:
        return settings.input_perturbation
    return settings.input_perturbation * max(0.0, 1.0 - (step - 1) / settings.input_perturbation_steps)


def rollout_probability(step: int, settings: RolloutSettings) -> float:
    """Probability that a sample is rolled out at an optimiser step, from 1 (spec 9)."""
    if not settings.ramp_steps:
        return settings.probability
    progress = min(1.0, max(0.0, (step - settings.start_step) / settings.ramp_steps))
    if settings.ramp_shape == "cosine":
        progress = 0.5 - 0.5 * math.cos(math.pi * progress)
    return settings.prob_start + (settings.prob_end - settings.prob_start) * progress


def rollout_offset(uniform: float, settings: RolloutSettings) -> int:
    """How many steps a chosen sample is rolled out for: 1 to max_step_offset.

    Args:
        uniform: in [0, 1).

    Raises:
        ValueError: the strategy is unknown.
    """
    spare = settings.max_step_offset - 1
    if settings.strategy == "uniform":
        return 1 + math.floor(uniform * (spare + 1))
    if settings.strategy == "biased_early":
        return 1 + round(uniform**2 * spare)
    if settings.strategy == "biased_late":
        return 1 + round((1.0 - uniform**2) * spare)
    raise ValueError(f"roll-out strategy {settings.strategy!r} is unknown; use one of {', '.join(ROLLOUT_STRATEGIES)}")


def reflexflow_losses(
    prediction: torch.Tensor,
    losses: torch.Tensor,
    *,
    clean_prediction: torch.Tensor,
    displacement: torch.Tensor,
    settings: ReflexflowSettings,
    weights: torch.Tensor | None = None,
    by_area: bool = False,
) -> torch.Tensor:
    """ReflexFlow's loss of rolled-out samples (spec 9). (B,)

    beta2 * mean((1 + alpha * |bias| / mean |bias|) * loss) + beta1 * the squared distance of the directions of
    prediction and displacement, which is 2 (1 - cos). bias is how far the rolled-out input moves the prediction.
    Divided by its sum instead of its mean, as in other programs, its weight would depend on the number of pixels and
    vanish.

    Args:
        prediction: (B, C, h, w), of the rolled-out input.
        losses: (B, C, h, w), of its pixels.
        clean_prediction: of the input without rolling out, without a gradient.
        displacement: the rolled-out input minus the latents: where the prediction should point.
        weights: (B, 1, h, w), of the pixels in both terms; see `mean_losses`, as for `by_area`.
    """
    bias = (clean_prediction - prediction.detach()).abs()
    scale = bias.flatten(1).mean(dim=1).clamp(min=torch.finfo(bias.dtype).tiny).view(-1, 1, 1, 1)
    velocity = mean_losses((1.0 + settings.alpha * bias / scale) * losses, weights, by_area=by_area)
    if weights is not None:
        prediction, displacement = prediction * weights, displacement * weights
    directions = functional.normalize(prediction.flatten(1), dim=1) - functional.normalize(
        displacement.flatten(1), dim=1
    )
    return settings.beta2 * velocity + settings.beta1 * directions.square().sum(dim=1)
