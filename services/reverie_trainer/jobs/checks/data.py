"""What may be said of the datasets."""

from collections.abc import Iterator

from reverie_common.errors import FieldViolation

from reverie_trainer.jobs.checks.rules import JOB_NAME, between, name, one_of, real, text, violation
from reverie_trainer.jobs.preparing.buckets import EVALUATION, step_range
from reverie_trainer.jobs.preparing.epochs import phases_of, steps_without_data
from reverie_trainer.jobs.spec import DatasetChoice, JobSpec

MAX_REPEATS = 1_000_000
MAX_STEPS = 1_000_000
MAX_EPOCHS = 100_000

RESOLUTION_TYPES = ("pixel_area", "area", "pixel")
CROP_STYLES = ("center", "corner", "random")
CROP_ASPECTS = ("square", "preserve", "random", "closest")
CAPTION_STRATEGIES = ("captions", "filename", "instanceprompt")
REGULARISATION = "regularisation"
ROLES = ("train", REGULARISATION, EVALUATION)
MASK_TYPES = ("none", "mask", "segmentation")
SAMPLINGS = ("auto", "uniform")

_PIXELS = (64.0, 4096.0)
_MEGAPIXELS = (0.004, 16.8)
_ASPECTS = (0.1, 10.0)
_SIZES = ("minimum_image_size", "maximum_image_size", "target_downsample_size")
_LISTED_ASPECTS = ("random", "closest")


def check_datasets(spec: JobSpec) -> Iterator[FieldViolation]:
    """Yield what is wrong with the choice of datasets, by itself."""
    if not spec.datasets:
        yield violation("datasets", "no dataset is given; name at least one that CreateDataset made")
    for index, choice in enumerate(spec.datasets):
        path = f"datasets[{index}]"
        yield from name(f"{path}.dataset", choice.dataset, JOB_NAME, "[a-z0-9-]")
        yield from between(f"{path}.repeats", choice.repeats, 0, MAX_REPEATS)
        yield from real(f"{path}.probability", choice.probability, above=0.0, at_most=1e6)
        yield from one_of(f"{path}.role", choice.role, ROLES)
        yield from one_of(f"{path}.mask_type", choice.mask_type, MASK_TYPES)
        yield from real(
            f"{path}.timestep_sampling_offset", choice.timestep_sampling_offset, at_least=-10.0, at_most=10.0
        )
        yield from _sizes(path, choice)
        yield from _aspects(path, choice)
        yield from _crop(path, choice)
        yield from _captions(path, choice)
        yield from _steps(path, choice)
    yield from one_of("dataset_sampling", spec.dataset_sampling, SAMPLINGS)
    yield from between("aspect_bucket_rounding", spec.aspect_bucket_rounding, 1, 9, "decimals")
    yield from _length(spec)
    yield from _roles(spec)
    yield from _coverage(spec)


def _sizes(path: str, choice: DatasetChoice) -> Iterator[FieldViolation]:
    yield from one_of(f"{path}.resolution_type", choice.resolution_type, RESOLUTION_TYPES)
    low, high = _MEGAPIXELS if choice.resolution_type == "area" else _PIXELS
    unit = "megapixels" if choice.resolution_type == "area" else "pixels"
    yield from between(f"{path}.resolution", choice.resolution, low, high, unit)
    for field in _SIZES:
        value = getattr(choice, field)
        if value:
            yield from between(f"{path}.{field}", value, low, high, unit)
    maximum, target = choice.maximum_image_size, choice.target_downsample_size
    if bool(maximum) != bool(target):
        missing, given = _SIZES[1:] if target else _SIZES[:0:-1]
        yield violation(f"{path}.{missing}", f"it is missing; {given} has no meaning without it, give both or none")
        return
    if maximum and target > maximum:
        yield violation(
            f"{path}.target_downsample_size", f"{target:g} is above maximum_image_size {maximum:g}; lower it"
        )
    if target and target < choice.resolution:
        yield violation(
            f"{path}.target_downsample_size",
            f"{target:g} is below resolution {choice.resolution:g}, so that pictures would be enlarged again; raise it",
        )


def _aspects(path: str, choice: DatasetChoice) -> Iterator[FieldViolation]:
    low, high = choice.minimum_aspect_ratio, choice.maximum_aspect_ratio
    for field, value in (("minimum_aspect_ratio", low), ("maximum_aspect_ratio", high)):
        yield from real(f"{path}.{field}", value, at_least=0.0, at_most=100.0)
    if low and high and low > high:
        yield violation(f"{path}.minimum_aspect_ratio", f"{low:g} is above maximum_aspect_ratio {high:g}; lower it")
    if choice.max_upscale_threshold:
        yield from real(f"{path}.max_upscale_threshold", choice.max_upscale_threshold, at_least=1.0, at_most=1e6)


def _crop(path: str, choice: DatasetChoice) -> Iterator[FieldViolation]:
    if choice.crop_style == "face":
        yield violation(
            f"{path}.crop_style",
            "'face' needs a face detector, and Reverie carries none; use center, or crop to the faces before uploading",
        )
    else:
        yield from one_of(f"{path}.crop_style", choice.crop_style, CROP_STYLES)
    yield from one_of(f"{path}.crop_aspect", choice.crop_aspect, CROP_ASPECTS)
    if not choice.crop and choice.crop_aspect != "square":
        yield violation(f"{path}.crop_aspect", f"{choice.crop_aspect!r} has no meaning without crop; set crop: true")
    yield from _crop_aspects(f"{path}.crop_aspect_buckets", choice)


def _crop_aspects(path: str, choice: DatasetChoice) -> Iterator[FieldViolation]:
    buckets = choice.crop_aspect_buckets
    is_listed = choice.crop_aspect in _LISTED_ASPECTS
    if is_listed and not buckets:
        yield violation(
            path, f"it is missing; crop_aspect {choice.crop_aspect!r} chooses from it, for instance [{{aspect: 1.5}}]"
        )
    if buckets and not is_listed:
        yield violation(path, f"crop_aspect {choice.crop_aspect!r} does not read it; use random or closest")
    for index, bucket in enumerate(buckets):
        yield from between(f"{path}[{index}].aspect", bucket.aspect, *_ASPECTS)
        if bucket.weight is not None:
            yield from real(f"{path}[{index}].weight", bucket.weight, above=0.0, at_most=1.0)
    weights = [bucket.weight for bucket in buckets if bucket.weight is not None]
    if weights and choice.crop_aspect == "closest":
        yield violation(path, "weights have no meaning with crop_aspect 'closest'; leave them out")
    elif weights and len(weights) < len(buckets):
        yield violation(path, f"{len(weights)} of {len(buckets)} aspects have a weight; give all of them one, or none")
    elif weights and abs(sum(weights) - 1) > 1e-6:
        yield violation(path, f"the weights sum to {sum(weights):.6g}, not to 1; change them")


def _captions(path: str, choice: DatasetChoice) -> Iterator[FieldViolation]:
    yield from one_of(f"{path}.caption_strategy", choice.caption_strategy, CAPTION_STRATEGIES)
    prompts = [("instance_prompt", choice.instance_prompt or "")]
    prompts += [(f"instance_prompts[{index}]", prompt) for index, prompt in enumerate(choice.instance_prompts)]
    for field, prompt in prompts:
        yield from text(f"{path}.{field}", prompt)
    yield from (
        violation(f"{path}.{field}", "it is blank; write a prompt or leave it out")
        for field, prompt in prompts[1:]
        if not prompt.strip()
    )
    has_prompt = bool(choice.instance_prompts) or choice.instance_prompt is not None
    if choice.instance_prompts and choice.instance_prompt is not None:
        yield violation(f"{path}.instance_prompts", "instance_prompt is given too; give one of both")
    if choice.caption_strategy == "instanceprompt" and not has_prompt:
        yield violation(f"{path}.instance_prompt", "it is missing; caption_strategy 'instanceprompt' reads it alone")
    if choice.prepend_instance_prompt and not has_prompt:
        yield violation(f"{path}.instance_prompt", "it is missing; prepend_instance_prompt puts it before each caption")
    if has_prompt and choice.caption_strategy == "filename" and not choice.prepend_instance_prompt:
        field = "instance_prompts" if choice.instance_prompts else "instance_prompt"
        yield violation(
            f"{path}.{field}",
            "it would do nothing: with caption_strategy 'filename' every picture has a caption; leave it out, set "
            "prepend_instance_prompt, or take caption_strategy 'instanceprompt'",
        )
    if choice.prepend_instance_prompt and choice.caption_strategy == "instanceprompt":
        yield violation(
            f"{path}.prepend_instance_prompt",
            "it has no meaning with caption_strategy 'instanceprompt', which has no captions; leave it out",
        )


def _steps(path: str, choice: DatasetChoice) -> Iterator[FieldViolation]:
    if choice.end_step and choice.end_step < choice.start_step:
        yield violation(f"{path}.end_step", f"{choice.end_step} is before start_step {choice.start_step}; raise it")
    if choice.role == EVALUATION and (choice.start_step or choice.end_step):
        yield violation(f"{path}.role", "an evaluation dataset is never trained on; leave start_step and end_step out")


def _length(spec: JobSpec) -> Iterator[FieldViolation]:
    optimization = spec.optimization
    if not optimization.num_epochs:
        yield from between("optimization.max_steps", optimization.max_steps, 1, MAX_STEPS, "optimiser steps")
        return
    yield from between("optimization.num_epochs", optimization.num_epochs, 1, MAX_EPOCHS, "epochs")
    if optimization.max_steps:
        yield violation(
            "optimization.max_steps", f"num_epochs {optimization.num_epochs} is given too; set one of both to 0"
        )


def _roles(spec: JobSpec) -> Iterator[FieldViolation]:
    """Refuse jobs that have nothing to learn: on regularisation data alone the loss is 0, and stays it."""
    roles = {choice.role for choice in spec.datasets}
    if roles and roles <= {REGULARISATION, EVALUATION}:
        only = (
            f"for {EVALUATION}" if roles == {EVALUATION} else f"for {REGULARISATION}, where a new adapter's loss is 0"
        )
        yield violation("datasets", f"every dataset is {only}; give one with role train")


def _coverage(spec: JobSpec) -> Iterator[FieldViolation]:
    """Refuse steps at which nothing would be trained on."""
    ranges = [step_range(choice) for choice in spec.datasets if choice.role != EVALUATION]
    if not ranges:
        return
    # An empty range is told by itself.
    if any(item.last is not None and item.last < item.first for item in ranges):
        return
    last_change = phases_of(ranges)[-1].steps.first
    gap = steps_without_data(ranges, spec.optimization.max_steps or max(last_change, 1))
    if gap is not None:
        what = f"steps {gap.first} to {gap.last}" if spec.optimization.max_steps else f"the steps from {gap.first} on"
        yield violation(
            "datasets", f"no dataset is used at {what}; change start_step or end_step, or set end_step to 0"
        )
