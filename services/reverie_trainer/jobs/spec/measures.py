"""What a job measures besides its loss, and the running average of its adapter."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The loss on images that are never trained on."""

    every_steps: int = 100
    every_epochs: float = 0.0
    num_images: int = 4
    num_timesteps: int = 28


@dataclass(frozen=True, kw_only=True, slots=True)
class Ema:
    """A running average of the adapter, in float32 (spec 5.7)."""

    decay: float = 0.995
    update_interval: int = 1
    warmup_steps: int = 0
    validation: str = "comparison"
