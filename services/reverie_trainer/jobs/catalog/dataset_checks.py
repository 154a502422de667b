"""What is wrong with a job's datasets that only the datasets themselves can tell: whether they hold what is needed."""

import difflib
from collections.abc import Iterator, Mapping, Sequence

from reverie_common.errors import FieldViolation

from reverie_trainer.jobs.catalog.manifests import Manifest
from reverie_trainer.jobs.checks.rules import MAX_PROMPT_CHARACTERS
from reverie_trainer.jobs.preparing.buckets import EMPTY_REMEDY, EVALUATION, describe_empty, minimum_repeats
from reverie_trainer.jobs.preparing.captions import captions_of
from reverie_trainer.jobs.spec import DatasetChoice, JobSpec

_MAX_NAMED_SAMPLES = 5


def check_contents(spec: JobSpec, manifests: Mapping[str, Manifest], known: Sequence[str]) -> Iterator[FieldViolation]:
    """Yield what is wrong with the job's datasets.

    Args:
        spec: the job.
        manifests: the datasets that exist, by name.
        known: names of all datasets, for a hint where one does not exist.
    """
    for index, choice in enumerate(spec.datasets):
        path = f"datasets[{index}]"
        manifest = manifests.get(choice.dataset)
        if manifest is None:
            if choice.dataset:
                yield _unknown_dataset(f"{path}.dataset", choice.dataset, known)
            continue
        if not manifest.samples:
            description = f"{describe_empty(choice.dataset, 0)}. {EMPTY_REMEDY}"
            yield FieldViolation(field=f"{path}.dataset", description=description)
            continue
        yield from _check_captions(path, choice, manifest)
        yield from _check_masks(path, choice, manifest)
        yield from _check_size(path, choice, manifest, spec)


def _unknown_dataset(path: str, name: str, known: Sequence[str]) -> FieldViolation:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else "create it first (`reverie dataset create NAME`)"
    return FieldViolation(field=path, description=f"there is no dataset {name[:80]!r}; {hint}")


def _check_captions(path: str, choice: DatasetChoice, manifest: Manifest) -> Iterator[FieldViolation]:
    texts = {sample.name: captions_of(sample, choice) for sample in manifest.samples}
    missing = [name for name, captions in texts.items() if not captions]
    if missing:
        description = (
            f"{len(missing)} of {len(manifest.samples)} samples of {choice.dataset!r} have no caption: "
            f"{_names(missing)}; add a .txt file beside each image, or set instance_prompt"
        )
        yield FieldViolation(field=f"{path}.instance_prompt", description=description)
    long = [name for name, captions in texts.items() if any(len(text) > MAX_PROMPT_CHARACTERS for text in captions)]
    if long:
        description = (
            f"{len(long)} captions of {choice.dataset!r} are above {MAX_PROMPT_CHARACTERS} characters with the "
            f"instance prompt before them: {_names(long)}; shorten them"
        )
        yield FieldViolation(field=f"{path}.prepend_instance_prompt", description=description)


def _check_masks(path: str, choice: DatasetChoice, manifest: Manifest) -> Iterator[FieldViolation]:
    if choice.mask_type == "none" or any(sample.mask is not None for sample in manifest.samples):
        return
    description = (
        f"{choice.dataset!r} has no masks; add them with `reverie dataset add {choice.dataset} FOLDER --masks FOLDER`, "
        "or leave mask_type out"
    )
    yield FieldViolation(field=f"{path}.mask_type", description=description)


def _check_size(path: str, choice: DatasetChoice, manifest: Manifest, spec: JobSpec) -> Iterator[FieldViolation]:
    """Refuse what cannot fill one step whatever the buckets; the buckets themselves are known after preparation."""
    effective = spec.optimization.effective_batch
    num_images = min(len(manifest.samples), choice.max_num_samples or len(manifest.samples))
    num_samples = num_images * (choice.repeats + 1)
    if choice.role == EVALUATION or spec.allow_dataset_oversubscription or effective < 1 or num_samples >= effective:
        return
    description = (
        f"dataset {choice.dataset!r} has {num_images} images and {choice.repeats} repeats = {num_samples} samples, one "
        f"step takes {effective} (batch_size {spec.optimization.batch_size} x gradient_accumulation_steps "
        f"{spec.optimization.gradient_accumulation_steps}): zero usable batches. "
        f"Minimum repeats required: {minimum_repeats(num_images, effective)}; or set allow_dataset_oversubscription, "
        "lower the batch, or add images"
    )
    yield FieldViolation(field=f"{path}.repeats", description=description)


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_MAX_NAMED_SAMPLES])
    return f"{shown} and {len(names) - _MAX_NAMED_SAMPLES} more" if len(names) > _MAX_NAMED_SAMPLES else shown
