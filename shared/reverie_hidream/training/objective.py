"""What a job trains towards: settings, and pure functions of tensors (spec 3).

B batch, C latent channels, h x w latent pixels. sigma is the noise level in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

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
