"""What is wrong with a job by itself: every violation at once, as field paths with value, limit and remedy.

What needs more than the job - datasets that exist, modules that an adapter matches - is checked in `admission`.
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Sequence

from reverie_common.errors import FieldViolation

from reverie_trainer.jobs.spec import (
    DatasetChoice,
    JobSpec,
    LokrAdapter,
    LokrOverrides,
    ModelChoice,
    Optimization,
    Validation,
    ValidationPrompt,
)

MAX_PROMPT_CHARACTERS = 8192
MAX_REPEATS = 1_000_000
MAX_PROMPTS = 100

_JOB_NAME = re.compile(r"[a-z0-9-]{1,63}")
_PROMPT_NAME = re.compile(r"[a-z0-9_-]{1,63}")
_PICTURE_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")

FLAVOURS = ("full", "dev", "fast")
PRECISIONS = ("no_change", "int8-quanto")
MIXED_PRECISIONS = ("bf16", "no")
RESOLUTION_TYPES = ("pixel_area", "pixel")
CROP_STYLES = ("center", "corner", "random")
OPTIMIZERS = ("adamw", "optimi-lion")
SCHEDULERS = ("constant_with_warmup", "cosine")
CLIP_METHODS = ("value", "norm")


def check_spec(spec: JobSpec) -> list[FieldViolation]:
    """Return everything that is wrong with a job by itself; an empty list means nothing."""
    return [
        *_name("name", spec.name, _JOB_NAME, "[a-z0-9-]"),
        *_model(spec.model),
        *_datasets(spec.datasets),
        *_adapter(spec.adapter),
        *_optimization(spec.optimization),
        *(_validation(spec.validation) if spec.validation is not None else ()),
        *_trigger_words(spec.trigger_words),
    ]


def check_dataset_name(name: str, path: str = "name") -> list[FieldViolation]:
    """Return what is wrong with the name of a dataset."""
    return list(_name(path, name, _JOB_NAME, "[a-z0-9-]"))


def picture_size(text: str) -> tuple[int, int] | None:
    """Return (width, height) in pixels of `WIDTHxHEIGHT`, None for anything else."""
    match = _PICTURE_SIZE.fullmatch(text)
    return (int(match[1]), int(match[2])) if match else None


def _model(model: ModelChoice) -> Iterator[FieldViolation]:
    yield from _one_of("model.flavour", model.flavour, FLAVOURS)
    yield from _one_of("model.base_precision", model.base_precision, PRECISIONS)
    yield from _one_of("model.mixed_precision", model.mixed_precision, MIXED_PRECISIONS)


def _datasets(datasets: Sequence[DatasetChoice]) -> Iterator[FieldViolation]:
    if not datasets:
        yield _violation("datasets", "no dataset is given; name at least one that CreateDataset made")
    for index, dataset in enumerate(datasets):
        path = f"datasets[{index}]"
        yield from _name(f"{path}.dataset", dataset.dataset, _JOB_NAME, "[a-z0-9-]")
        yield from _between(f"{path}.repeats", dataset.repeats, 0, MAX_REPEATS)
        yield from _between(f"{path}.resolution", dataset.resolution, 64, 4096, "pixels")
        yield from _one_of(f"{path}.resolution_type", dataset.resolution_type, RESOLUTION_TYPES)
        yield from _one_of(f"{path}.crop_style", dataset.crop_style, CROP_STYLES)
        if dataset.instance_prompt is not None:
            yield from _text(f"{path}.instance_prompt", dataset.instance_prompt)


def _adapter(adapter: LokrAdapter | None) -> Iterator[FieldViolation]:
    if adapter is None:
        yield _violation("adapter", "no adapter is given; set adapter.lokr, `{}` takes every default")
        return
    path = "adapter.lokr"
    yield from _factor(f"{path}.factor", adapter.factor)
    yield from _between(f"{path}.linear_dim", adapter.linear_dim, 1, 1_000_000)
    yield from _positive(f"{path}.linear_alpha", adapter.linear_alpha)
    yield from _positive(f"{path}.multiplier", adapter.multiplier)
    preset = adapter.apply_preset
    for name, overrides in preset.module_algo_map.items():
        yield from _overrides(f"{path}.apply_preset.module_algo_map[{name!r}]", overrides)
    for name, overrides in preset.name_algo_map.items():
        yield from _overrides(f"{path}.apply_preset.name_algo_map[{name!r}]", overrides)
    if not preset.use_fnmatch:
        yield from _regular_expressions(f"{path}.apply_preset.name_algo_map", preset.name_algo_map)


def _overrides(path: str, overrides: LokrOverrides) -> Iterator[FieldViolation]:
    if overrides.factor is not None:
        yield from _factor(f"{path}.factor", overrides.factor)
    if overrides.linear_dim is not None:
        yield from _between(f"{path}.linear_dim", overrides.linear_dim, 1, 1_000_000)
    if overrides.linear_alpha is not None:
        yield from _positive(f"{path}.linear_alpha", overrides.linear_alpha)


def _regular_expressions(path: str, patterns: Iterable[str]) -> Iterator[FieldViolation]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield _violation(
                f"{path}[{pattern!r}]",
                f"{pattern!r} is no regular expression ({error}); correct it or set use_fnmatch",
            )


def _optimization(optimization: Optimization) -> Iterator[FieldViolation]:
    path = "optimization"
    yield from _between(f"{path}.max_steps", optimization.max_steps, 1, 1_000_000, "optimiser steps")
    yield from _between(f"{path}.batch_size", optimization.batch_size, 1, 128, "samples")
    yield from _between(f"{path}.gradient_accumulation_steps", optimization.gradient_accumulation_steps, 1, 1024)
    yield from _one_of(f"{path}.optimizer", optimization.optimizer, OPTIMIZERS)
    yield from _real(f"{path}.learning_rate", optimization.learning_rate, above=0.0, at_most=1.0)
    yield from _between(f"{path}.lr_warmup_steps", optimization.lr_warmup_steps, 0, 1_000_000, "optimiser steps")
    yield from _one_of(f"{path}.lr_scheduler", optimization.lr_scheduler, SCHEDULERS)
    if optimization.weight_decay is not None:
        yield from _real(f"{path}.weight_decay", optimization.weight_decay, at_least=0.0)
    yield from _real(f"{path}.max_grad_norm", optimization.max_grad_norm, at_least=0.0)
    yield from _one_of(f"{path}.grad_clip_method", optimization.grad_clip_method, CLIP_METHODS)
    yield from _positive(f"{path}.flow_schedule_shift", optimization.flow_schedule_shift)
    yield from _positive(f"{path}.flow_sigmoid_scale", optimization.flow_sigmoid_scale)
    dropout = optimization.caption_dropout_probability
    yield from _real(f"{path}.caption_dropout_probability", dropout, at_least=0.0, at_most=1.0)


def _validation(validation: Validation) -> Iterator[FieldViolation]:
    path = "validation"
    if not validation.prompts:
        yield _violation(f"{path}.prompts", "no prompt is given; give at least one, or leave validation out")
    if len(validation.prompts) > MAX_PROMPTS:
        yield _violation(f"{path}.prompts", f"{len(validation.prompts)} prompts are above {MAX_PROMPTS}; give fewer")
    yield from _prompts(f"{path}.prompts", validation.prompts)
    for index, size in enumerate(validation.resolutions):
        yield from _picture_size(f"{path}.resolutions[{index}]", size)
    yield from _repeated(f"{path}.resolutions", validation.resolutions)
    yield from _between(f"{path}.num_inference_steps", validation.num_inference_steps, 1, 200, "sampling steps")
    yield from _real(f"{path}.guidance_scale", validation.guidance_scale, at_least=0.0, at_most=100.0)
    yield from _text(f"{path}.negative_prompt", validation.negative_prompt)
    yield from _between(f"{path}.num_images", validation.num_images, 1, 10, "pictures")
    yield from _real(f"{path}.adapter_strength", validation.adapter_strength, at_least=-10.0, at_most=10.0)


def _prompts(path: str, prompts: Sequence[ValidationPrompt]) -> Iterator[FieldViolation]:
    for index, prompt in enumerate(prompts):
        yield from _name(f"{path}[{index}].name", prompt.name, _PROMPT_NAME, "[a-z0-9_-]")
        yield from _text(f"{path}[{index}].prompt", prompt.prompt)
    yield from _repeated(path, [prompt.name for prompt in prompts])


def _repeated(path: str, values: Sequence[str]) -> Iterator[FieldViolation]:
    for value in sorted({value for value in values if values.count(value) > 1}):
        yield _violation(path, f"{value!r} is given {values.count(value)} times; pictures need distinct file names")


def _picture_size(path: str, text: str) -> Iterator[FieldViolation]:
    size = picture_size(text)
    if size is None:
        yield _violation(path, f"{text!r} is no picture size; write WIDTHxHEIGHT, for instance 1024x1024")
        return
    for pixels, side in zip(size, ("width", "height"), strict=True):
        if pixels % 16 != 0:
            nearest = max(64, 16 * round(pixels / 16))
            yield _violation(path, f"{side} {pixels} of {text!r} is no multiple of 16; use {nearest}")
        elif not 64 <= pixels <= 4096:
            yield _violation(path, f"{side} {pixels} of {text!r} is outside 64 to 4096 pixels")


def _trigger_words(words: Sequence[str]) -> Iterator[FieldViolation]:
    for index, word in enumerate(words):
        if not word.strip() or len(word) > 255:
            yield _violation(f"trigger_words[{index}]", f"{word[:40]!r} must have 1 to 255 characters")


def _name(path: str, name: str, pattern: re.Pattern[str], letters: str) -> Iterator[FieldViolation]:
    if not name:
        yield _violation(path, f"it is missing; give 1 to 63 characters of {letters}")
    elif not pattern.fullmatch(name):
        yield _violation(path, f"{name[:100]!r} does not match {letters}{{1,63}}; rename it")


def _text(path: str, text: str) -> Iterator[FieldViolation]:
    if len(text) > MAX_PROMPT_CHARACTERS:
        yield _violation(
            path, f"{len(text)} characters are above {MAX_PROMPT_CHARACTERS}; shorten it (encoders read 128 tokens)"
        )


def _one_of(path: str, value: str, allowed: Sequence[str]) -> Iterator[FieldViolation]:
    if value in allowed:
        return
    close = difflib.get_close_matches(value, allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    names = ", ".join(allowed)
    yield _violation(path, f"unknown value {value[:100]!r}, expected one of {names}{hint}")


def _between(path: str, value: int, low: int, high: int, unit: str = "") -> Iterator[FieldViolation]:
    if not low <= value <= high:
        suffix = f" {unit}" if unit else ""
        direction = "raise" if value < low else "lower"
        yield _violation(path, f"{value} is outside {low} to {high}{suffix}; {direction} it")


def _factor(path: str, factor: int) -> Iterator[FieldViolation]:
    if factor != -1 and not 1 <= factor <= 65536:
        yield _violation(path, f"{factor} is neither -1 nor within 1 to 65536; -1 is the most balanced split")


def _positive(path: str, value: float) -> Iterator[FieldViolation]:
    yield from _real(path, value, above=0.0)


def _real(
    path: str, value: float, *, above: float = -math.inf, at_least: float = -math.inf, at_most: float = math.inf
) -> Iterator[FieldViolation]:
    if math.isfinite(value) and above < value and at_least <= value <= at_most:
        return
    limits = []
    if above > -math.inf:
        limits.append(f"above {above:g}")
    if at_least > -math.inf:
        limits.append(f"at least {at_least:g}")
    if at_most < math.inf:
        limits.append(f"at most {at_most:g}")
    yield _violation(path, f"{value!r} is not a finite number {' and '.join(limits)}")


def _violation(path: str, description: str) -> FieldViolation:
    return FieldViolation(field=path, description=description)
