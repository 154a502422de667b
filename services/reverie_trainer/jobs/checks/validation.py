"""What may be said of the pictures."""

import re
from collections.abc import Iterator

from reverie_common.errors import FieldViolation
from reverie_common.sampling_methods import SCHEDULERS

from reverie_trainer.jobs.checks.measures import MAX_EPOCHS
from reverie_trainer.jobs.checks.rules import PROMPT_NAME, between, name, one_of, real, repeated, text, violation
from reverie_trainer.jobs.preparing.prompt_library import LIBRARY_PREFIX, prompts_of
from reverie_trainer.jobs.spec import Validation, ValidationPrompt

MAX_PROMPTS = 100

_PICTURE_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


def picture_size(text: str) -> tuple[int, int] | None:
    """Return (width, height) in pixels of `WIDTHxHEIGHT`, None for anything else."""
    match = _PICTURE_SIZE.fullmatch(text)
    return (int(match[1]), int(match[2])) if match else None


def check_validation(validation: Validation) -> Iterator[FieldViolation]:
    """Yield what is wrong with the validation."""
    path = "validation"
    yield from _prompts(f"{path}.prompts", validation)
    yield from between(f"{path}.every_epochs", validation.every_epochs, 0, MAX_EPOCHS, "epochs")
    for index, size in enumerate(validation.resolutions):
        yield from _picture_size(f"{path}.resolutions[{index}]", size)
    yield from repeated(f"{path}.resolutions", validation.resolutions)
    yield from between(f"{path}.num_inference_steps", validation.num_inference_steps, 1, 200, "sampling steps")
    yield from real(f"{path}.guidance_scale", validation.guidance_scale, at_least=0.0, at_most=100.0)
    yield from text(f"{path}.negative_prompt", validation.negative_prompt)
    yield from between(f"{path}.num_images", validation.num_images, 1, 10, "pictures")
    yield from _strength(f"{path}.adapter_strength", validation.adapter_strength)
    yield from real(f"{path}.guidance_rescale", validation.guidance_rescale, at_least=0.0, at_most=1.0)
    yield from between(f"{path}.preview_steps", validation.preview_steps, 0, 200, "sampling steps")
    if validation.scheduler is not None:
        yield from one_of(f"{path}.scheduler", validation.scheduler, SCHEDULERS)
    if validation.shift is not None:
        yield from real(f"{path}.shift", validation.shift, above=0.0, at_most=100.0)


def _prompts(path: str, validation: Validation) -> Iterator[FieldViolation]:
    drawn = prompts_of(validation)
    if not drawn:
        yield violation(
            path,
            "no prompt is given; give at least one, or prompt_library: true for the built-in ones, or leave validation "
            "out",
        )
    if len(drawn) > MAX_PROMPTS:
        yield violation(path, f"{len(drawn)} prompts are above {MAX_PROMPTS}; give fewer")
    for index, prompt in enumerate(validation.prompts):
        yield from _prompt(f"{path}[{index}]", prompt)
    yield from repeated(path, [prompt.name for prompt in drawn])


def _prompt(path: str, prompt: ValidationPrompt) -> Iterator[FieldViolation]:
    yield from name(f"{path}.name", prompt.name, PROMPT_NAME, "[a-z0-9_-]")
    if prompt.name.startswith(LIBRARY_PREFIX):
        yield violation(
            f"{path}.name", f"{prompt.name!r} begins with {LIBRARY_PREFIX!r}, as the built-in prompts do; rename it"
        )
    yield from text(f"{path}.prompt", prompt.prompt)
    if prompt.adapter_strength is not None:
        yield from _strength(f"{path}.adapter_strength", prompt.adapter_strength)


def _strength(path: str, value: float) -> Iterator[FieldViolation]:
    yield from real(path, value, at_least=-10.0, at_most=10.0)


def _picture_size(path: str, text: str) -> Iterator[FieldViolation]:
    size = picture_size(text)
    if size is None:
        yield violation(path, f"{text!r} is no picture size; write WIDTHxHEIGHT, for instance 1024x1024")
        return
    for pixels, side in zip(size, ("width", "height"), strict=True):
        if pixels % 16 != 0:
            nearest = max(64, 16 * round(pixels / 16))
            yield violation(path, f"{side} {pixels} of {text!r} is no multiple of 16; use {nearest}")
        elif not 64 <= pixels <= 4096:
            yield violation(path, f"{side} {pixels} of {text!r} is outside 64 to 4096 pixels")
