"""Whether a job is accepted: everything that is wrong with it at once, with what was learnt on the way."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reverie_common.errors import FieldViolation, InvalidArgumentError

from reverie_trainer.jobs.admission.adapter_selection import AdapterSelection, TransformerConfig, select_adapter
from reverie_trainer.jobs.catalog.dataset_checks import check_contents
from reverie_trainer.jobs.catalog.datasets import Datasets
from reverie_trainer.jobs.catalog.manifests import Manifest
from reverie_trainer.jobs.checks import check_spec, picture_size
from reverie_trainer.jobs.preparing.buckets import Bucket, step_range
from reverie_trainer.jobs.preparing.geometry import square_edge
from reverie_trainer.jobs.spec import (
    Adapter,
    DatasetChoice,
    FullRank,
    JobSpec,
    LokrAdapter,
    LoraAdapter,
    LycorisAdapter,
)

# What S3 takes in one request.
MAX_FULL_RANK_BYTES = 5_000_000_000

_ADAPTER_NAMES: Mapping[type, str] = {
    LokrAdapter: "LoKr",
    LycorisAdapter: "LyCORIS",
    LoraAdapter: "LoRA",
    FullRank: "full rank",
}


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
    notices: tuple[tuple[str, str], ...] = ()
    """What will be missing although the job is accepted: (reason, message)."""

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
    violations += check_contents(spec, manifests, known)
    selection = None
    if spec.adapter is not None and not any(item.field.startswith("adapter") for item in violations):
        selection, adapter_violations = _select(config, spec.adapter)
        violations += adapter_violations
    violations += _check_pictures(spec, config)
    violations += _check_offloading(spec, config)
    return Admission(
        spec=spec, violations=tuple(violations), manifests=manifests, versions=versions, selection=selection
    )


def _select(config: TransformerConfig, adapter: Adapter) -> tuple[AdapterSelection | None, list[FieldViolation]]:
    try:
        selection = select_adapter(config, adapter)
    except ValueError as error:
        return None, [FieldViolation(field="adapter.lycoris", description=str(error))]
    if isinstance(adapter, FullRank) and 2 * selection.num_parameters > MAX_FULL_RANK_BYTES:
        description = (
            f"{selection.num_parameters:,} weights make a file above {MAX_FULL_RANK_BYTES:,} bytes, more than one "
            "object holds, and a job trains in one process; train an adapter"
        )
        return selection, [FieldViolation(field="adapter.full_rank", description=description)]
    if isinstance(adapter, LokrAdapter) and adapter.init_lokr_norm is not None and selection.split:
        description = (
            f"{adapter.init_lokr_norm:g} needs whole factors, and linear_dim {adapter.linear_dim} splits those of "
            f"{len(selection.split)} modules, {selection.split[0]} for one; set full_matrix, or leave it out"
        )
        return selection, [FieldViolation(field="adapter.lokr.init_lokr_norm", description=description)]
    if selection.num_modules:
        return selection, []
    asked = list(selection.unmatched)
    what = ", ".join(repr(name) for name in asked) if asked else "an empty apply_preset"
    if isinstance(adapter, LoraAdapter):
        field, remedy = "adapter.lora.target_modules", "use to_q, to_k, to_v, to_out"
    else:
        kind = "lokr" if isinstance(adapter, LokrAdapter) else "lycoris"
        field = f"adapter.{kind}.apply_preset"
        remedy = "use target_module [Attention] or name_algo_map patterns such as 'double_stream_blocks.*.block.attn*'"
        if isinstance(adapter, LokrAdapter | LycorisAdapter) and adapter.apply_preset.exclude_name:
            remedy += f", or take something off exclude_name {list(adapter.apply_preset.exclude_name)}"
    description = f"{what} matches no Linear layer of the model, so nothing would be trained; {remedy}"
    return selection, [FieldViolation(field=field, description=description)]


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


def _check_offloading(spec: JobSpec, config: TransformerConfig) -> list[FieldViolation]:
    num_blocks = config.num_layers + config.num_single_layers
    if spec.memory.num_offloaded_blocks <= num_blocks:
        return []
    description = f"{spec.memory.num_offloaded_blocks} is above the model's {num_blocks} blocks; lower it"
    return [FieldViolation(field="memory.num_offloaded_blocks", description=description)]


def warnings_of(admission: Admission, config: TransformerConfig) -> list[tuple[str, str]]:
    """Return what is not as it was asked for although the job is accepted: (reason, message) for notices."""
    warnings = []
    for choice in admission.spec.datasets:
        if square_edge(choice.resolution, choice.resolution_type) ** 2 > config.max_pixels:
            warnings.append(
                (
                    "RESOLUTION_ABOVE_CANVAS",
                    f"dataset {choice.dataset}: resolution {choice.resolution:g} is above this model's canvas of "
                    f"{config.max_pixels} pixels; buckets are made to fit",
                )
            )
    if admission.selection is not None and admission.selection.unmatched:
        unmatched = ", ".join(admission.selection.unmatched)
        warnings.append(("ADAPTER_PARTLY_UNMATCHED", f"adapter: nothing matches {unmatched}"))
    return [*warnings, *admission.notices]


def describe_plan(admission: Admission, config: TransformerConfig, buckets: Sequence[Bucket] | None) -> list[str]:
    """Return the plan of a job that is accepted, a line for each part; buckets are None where not known yet."""
    lines = [_describe_dataset(admission, choice) for choice in admission.spec.datasets]
    if buckets is None:
        lines.append("buckets: planned when the images have been opened")
    else:
        lines += [f"bucket {item.width}x{item.height} of {item.dataset}: {item.num_images} images" for item in buckets]
    lines += _describe_training(admission)
    return lines + [f"WARNING: {message}" for _, message in warnings_of(admission, config)]


def _describe_dataset(admission: Admission, choice: DatasetChoice) -> str:
    num_images = len(admission.manifests[choice.dataset].samples)
    if choice.max_num_samples:
        num_images = min(num_images, choice.max_num_samples)
    crops = f"{choice.crop_aspect} crops" if choice.crop else "aspect buckets"
    text = (
        f"dataset {choice.dataset}: {num_images} images x {choice.repeats + 1} passes, resolution "
        f"{choice.resolution:g} ({choice.resolution_type}), {crops}"
    )
    if choice.role != "train":
        text += f", {choice.role}"
    steps = str(step_range(choice))
    return text if steps == "all" else f"{text}, steps {steps}"


def _describe_training(admission: Admission) -> list[str]:
    lines = []
    optimization = admission.spec.optimization
    length = f"{optimization.max_steps} steps" if optimization.max_steps else f"{optimization.num_epochs} epochs"
    lines.append(
        f"{length} of {optimization.effective_batch} samples, {optimization.optimizer} at "
        f"{optimization.learning_rate:g}"
    )
    if admission.selection is not None:
        lines.append(
            f"adapter: {_adapter_name(admission.spec.adapter)} on {admission.selection.num_modules} modules, "
            f"{admission.selection.num_parameters:,} parameters"
        )
    return lines


def _adapter_name(adapter: Adapter | None) -> str:
    name = _ADAPTER_NAMES.get(type(adapter), "none")
    return f"{name} {adapter.algo}" if isinstance(adapter, LycorisAdapter) else name


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
