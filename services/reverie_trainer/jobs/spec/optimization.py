"""How a job trains."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Reflexflow:
    """ReflexFlow's weights, for rolled-out samples alone."""

    alpha: float = 1.0
    beta1: float = 10.0
    beta2: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledSampling:
    """Rolling out (spec 9)."""

    max_step_offset: int = 0
    probability: float = 0.0
    prob_start: float = 0.0
    prob_end: float = 0.5
    ramp_steps: int = 0
    ramp_shape: str = "linear"
    start_step: int = 0
    strategy: str = "uniform"
    num_inference_steps: int = 30
    sampler: str = "euler"
    reflexflow: Reflexflow | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimization:
    """How to train."""

    max_steps: int = 0
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    lr_warmup_steps: int = 0
    lr_scheduler: str = "constant_with_warmup"
    weight_decay: float | None = None
    """None where the optimizer has no default because it is unknown."""
    max_grad_norm: float = 2.0
    grad_clip_method: str = "value"
    gradient_checkpointing: bool = True
    flow_schedule_shift: float = 3.0
    flow_sigmoid_scale: float = 1.0
    caption_dropout_probability: float = 0.1
    sample_latents_once: bool = False
    num_epochs: int = 0
    optimizer_config: Mapping[str, str] = field(default_factory=dict)
    beta1: float | None = None
    beta2: float | None = None
    lr_end: float = 0.0
    lr_power: float = 0.8
    lr_num_cycles: int = 1
    gradient_release: bool = False
    timestep_sampling: str = "sigmoid"
    flow_beta_schedule_alpha: float = 2.0
    flow_beta_schedule_beta: float = 2.0
    flow_custom_timesteps: tuple[float, ...] = ()
    flow_timesteps_mode: str = "random"
    mixflow_gamma: float = 0.8
    flow_schedule_auto_shift: bool = False
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
    scheduled_sampling: ScheduledSampling | None = None

    @property
    def effective_batch(self) -> int:
        """Samples in one optimiser step."""
        return self.batch_size * self.gradient_accumulation_steps
