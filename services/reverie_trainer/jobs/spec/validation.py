"""Which pictures a job has drawn, and when."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationPrompt:
    """One prompt to draw."""

    name: str = ""
    prompt: str = ""
    adapter_strength: float | None = None
    """None is that of the validation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """Which pictures to draw, and when."""

    every_steps: int = 200
    prompts: tuple[ValidationPrompt, ...] = ()
    resolutions: tuple[str, ...] = ("1024x1024",)
    num_inference_steps: int = 20
    guidance_scale: float = 5.0
    negative_prompt: str = ""
    seed: int = 0
    """Of the job, where the validation names none."""
    num_images: int = 1
    disable_benchmark: bool = False
    adapter_strength: float = 1.0
    guidance_rescale: float = 0.0
    prompt_library: bool = False
    unconditional: bool = False
    preview_steps: int = 0
    clip_score: bool = False
    compile: bool = False
    scheduler: str | None = None
    shift: float | None = None
    every_epochs: float = 0.0
