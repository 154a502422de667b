"""The model that a job trains on, and what saves its memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChoice:
    """The model to train on."""

    flavour: str = "full"
    base_precision: str = "no_change"
    mixed_precision: str = "bf16"
    quantize_via: str = "accelerator"
    text_encoder_precision: Mapping[str, str] = field(default_factory=dict)
    """What the services' encoders must be held in, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What saves memory at the cost of time."""

    gradient_checkpointing_interval: int = 1
    num_offloaded_blocks: int = 0
    offload_during_startup: bool = False
