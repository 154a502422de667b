"""Whether a job is accepted: everything that is wrong with it at once, with what was learnt on the way."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reverie_common.errors import FieldViolation, InvalidArgumentError

from reverie_trainer.jobs.adapter_selection import AdapterSelection, TransformerConfig, select_adapter
from reverie_trainer.jobs.buckets import EMPTY_REMEDY, Bucket, describe_empty, minimum_repeats
from reverie_trainer.jobs.checks import check_spec, picture_size
from reverie_trainer.jobs.datasets import Datasets
from reverie_trainer.jobs.manifests import Manifest
from reverie_trainer.jobs.spec import DatasetChoice, JobSpec, LokrAdapter

_MAX_NAMED_SAMPLES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """What is known of a job before anything is done for it."""

    spec: JobSpec
    violations: tuple[FieldViolation, ...]
    manifests: Mapping[str, Manifest]
    """The datasets that exist, by name."""
    versions: Mapping[str, str]
    """The version of each dataset that exists."""
    selection: AdapterSelection | None
    """What the adapter changes; None where the adapter is wrong by itself."""

    def require(self) -> None:
        """Raise InvalidArgumentError with every violation, if there is any."""
        if self.violations:
            first = self.violations[0]
            more = f" (and {len(self.violations) - 1} more)" if len(self.violations) > 1 else ""
            raise InvalidArgumentError(
                f"the job is not accepted: {first.field}: {first.description}{more}",
                reason="INVALID_JOB",
                violations=self.violations,
            )


async def examine(spec: JobSpec, datasets: Datasets, config: TransformerConfig) -> Admission:
    """Check a job against the datasets that exist and the model that it would train."""
    violations = check_spec(spec)
    versions = await datasets.versions(choice.dataset for choice in spec.datasets)
    manifests = {name: await datasets.load(name, version) for name, version in versions.items()}
    known = await datasets.names() if len(versions) < len({item.dataset for item in spec.datasets}) else []
    violations += _check_datasets(spec, manifests, known)
    selection = None
    if isinstance(spec.adapter, LokrAdapter) and not any(item.field.startswith("adapter") for item in violations):
        selection = select_adapter(config, spec.adapter)
        violations += _check_selection(selection, spec.adapter)
    violations += _check_pictures(spec, config)
    return Admission(
        spec=spec, violations=tuple(violations), manifests=manifests, versions=versions, selection=selection
    )


def captions_of(captions: Sequence[str], choice: DatasetChoice) -> tuple[str, ...]:
    """Return the captions that a sample is trained with: its own, else the job's instance_prompt, else none."""
    if captions:
        return tuple(captions)
    return (choice.instance_prompt,) if choice.instance_prompt is not None else ()


def _check_datasets(spec: JobSpec, manifests: Mapping[str, Manifest], known: Sequence[str]) -> list[FieldViolation]:
    violations = []
    for index, choice in enumerate(spec.datasets):
        path = f"datasets[{index}]"
        manifest = manifests.get(choice.dataset)
        if manifest is None:
            if choice.dataset:
                violations.append(_unknown_dataset(f"{path}.dataset", choice.dataset, known))
            continue
        if not manifest.samples:
            description = f"{describe_empty(choice.dataset, 0)}. {EMPTY_REMEDY}"
            violations.append(FieldViolation(field=f"{path}.dataset", description=description))
            continue
        violations += _check_captions(path, choice, manifest)
        violations += _check_size(path, choice, manifest, spec)
    return violations


def _unknown_dataset(path: str, name: str, known: Sequence[str]) -> FieldViolation:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else "create it first (`reverie dataset create NAME`)"
    return FieldViolation(field=path, description=f"there is no dataset {name[:80]!r}; {hint}")


def _check_captions(path: str, choice: DatasetChoice, manifest: Manifest) -> list[FieldViolation]:
    missing = [sample.name for sample in manifest.samples if not captions_of(sample.captions, choice)]
    if not missing:
        return []
    shown = ", ".join(repr(name) for name in missing[:_MAX_NAMED_SAMPLES])
    more = f" and {len(missing) - _MAX_NAMED_SAMPLES} more" if len(missing) > _MAX_NAMED_SAMPLES else ""
    description = (
        f"{len(missing)} of {len(manifest.samples)} samples of {choice.dataset!r} have no caption: {shown}{more}; "
        "add a .txt file beside each image, or set instance_prompt"
    )
    return [FieldViolation(field=f"{path}.instance_prompt", description=description)]


def _check_size(path: str, choice: DatasetChoice, manifest: Manifest, spec: JobSpec) -> list[FieldViolation]:
    """Refuse what cannot fill one step whatever the buckets; the buckets themselves are known after preparation."""
    effective = spec.optimization.effective_batch
    num_images = len(manifest.samples)
    num_samples = num_images * (choice.repeats + 1)
    if effective < 1 or num_samples >= effective:
        return []
    description = (
        f"dataset {choice.dataset!r} has {num_images} images and {choice.repeats} repeats = {num_samples} samples, one "
        f"step takes {effective} (batch_size {spec.optimization.batch_size} x gradient_accumulation_steps "
        f"{spec.optimization.gradient_accumulation_steps}): zero usable batches. "
        f"Minimum repeats required: {minimum_repeats(num_images, effective)}; or lower the batch, or add images"
    )
    return [FieldViolation(field=f"{path}.repeats", description=description)]


def _check_selection(selection: AdapterSelection, adapter: LokrAdapter) -> list[FieldViolation]:
    if selection.num_modules:
        return []
    preset = adapter.apply_preset
    asked = [*preset.target_module, *preset.module_algo_map, *preset.name_algo_map]
    what = ", ".join(repr(name) for name in asked) if asked else "an empty apply_preset"
    description = (
        f"{what} matches no Linear layer of the model, so nothing would be trained; use target_module [Attention] or "
        "name_algo_map patterns such as 'double_stream_blocks.*.block.attn*'"
    )
    return [FieldViolation(field="adapter.lokr.apply_preset", description=description)]


def _check_pictures(spec: JobSpec, config: TransformerConfig) -> list[FieldViolation]:
    """Refuse pictures that the model cannot draw: one that is not square is padded to the canvas (spec 1.6)."""
    violations = []
    for index, text in enumerate(spec.validation.resolutions if spec.validation is not None else ()):
        size = picture_size(text)
        if size is not None and size[0] != size[1] and size[0] * size[1] > config.max_pixels:
            description = (
                f"{text} has {size[0] * size[1]} pixels; this model draws at most {config.max_pixels} where width and "
                "height differ; use a smaller or a square size"
            )
            violations.append(FieldViolation(field=f"validation.resolutions[{index}]", description=description))
    return violations


def warnings_of(admission: Admission, config: TransformerConfig) -> list[tuple[str, str]]:
    """Return what is not as it was asked for although the job is accepted: (reason, message) for notices."""
    warnings = []
    for choice in admission.spec.datasets:
        if choice.resolution**2 > config.max_pixels:
            warnings.append(
                (
                    "RESOLUTION_ABOVE_CANVAS",
                    f"dataset {choice.dataset}: resolution {choice.resolution} is above this model's canvas of "
                    f"{config.max_pixels} pixels; buckets are made to fit",
                )
            )
    if admission.selection is not None and admission.selection.unmatched:
        unmatched = ", ".join(admission.selection.unmatched)
        warnings.append(("ADAPTER_PARTLY_UNMATCHED", f"adapter: nothing matches {unmatched}"))
    return warnings


def describe_plan(admission: Admission, config: TransformerConfig, buckets: Sequence[Bucket] | None) -> list[str]:
    """Return the plan of a job that is accepted, a line for each part; buckets are None where not known yet."""
    lines = []
    for choice in admission.spec.datasets:
        num_images = len(admission.manifests[choice.dataset].samples)
        lines.append(
            f"dataset {choice.dataset}: {num_images} images x {choice.repeats + 1} passes, resolution "
            f"{choice.resolution} ({choice.resolution_type}), {'square crops' if choice.crop else 'aspect buckets'}"
        )
    if buckets is None:
        lines.append("buckets: planned when the images have been opened")
    else:
        lines += [f"bucket {item.width}x{item.height} of {item.dataset}: {item.num_images} images" for item in buckets]
    lines += _describe_training(admission)
    return lines + [f"WARNING: {message}" for _, message in warnings_of(admission, config)]


def _describe_training(admission: Admission) -> list[str]:
    lines = []
    optimization = admission.spec.optimization
    lines.append(
        f"{optimization.max_steps} steps of {optimization.effective_batch} samples, {optimization.optimizer} at "
        f"{optimization.learning_rate:g}"
    )
    if admission.selection is not None:
        lines.append(
            f"adapter: LoKr on {admission.selection.num_modules} modules, "
            f"{admission.selection.num_parameters:,} parameters"
        )
    return lines


def parse_config(body: bytes, source: str) -> TransformerConfig:
    """Return the transformer's configuration from the bytes of its `config.json`.

    Raises:
        InvalidArgumentError: it is no configuration of a HiDream transformer.
    """
    try:
        return TransformerConfig.from_json(json.loads(body))
    except (ValueError, AttributeError) as error:
        raise InvalidArgumentError(
            f"{source} is not the configuration of a HiDream transformer: {error}",
            reason="CHECKPOINT_INVALID",
            metadata={"source": source},
        ) from error
