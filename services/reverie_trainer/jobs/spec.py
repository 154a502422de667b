"""What a training job asks for: the domain form of `TrainingJobSpec`, with every default of the contract filled in.

Whether the values make sense is decided in `spec_checks`; here they are only carried.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from google.protobuf.message import Message
from reverie.training.v1 import job_pb2

DEFAULT_WEIGHT_DECAY = {"adamw": 0.01, "optimi-lion": 0.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChoice:
    """The model to train on."""

    flavour: str = "full"
    base_precision: str = "no_change"
    mixed_precision: str = "bf16"


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetChoice:
    """One dataset in a job and how its images are brought to size."""

    dataset: str
    repeats: int = 0
    """Extra passes in each epoch: 0 is one pass."""
    resolution: int = 1024
    resolution_type: str = "pixel_area"
    crop: bool = False
    crop_style: str = "center"
    instance_prompt: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LokrOverrides:
    """What a selection changes about the adapter; None leaves a field as it is."""

    factor: int | None = None
    linear_dim: int | None = None
    linear_alpha: float | None = None
    full_matrix: bool | None = None
    use_scalar: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LokrPreset:
    """Which modules are adapted, with the names of the job file (aliases are not resolved here)."""

    target_module: tuple[str, ...] = ()
    module_algo_map: Mapping[str, LokrOverrides] = field(default_factory=dict)
    name_algo_map: Mapping[str, LokrOverrides] = field(default_factory=dict)
    use_fnmatch: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class LokrAdapter:
    """LyCORIS LoKr."""

    factor: int = 16
    linear_dim: int = 16384
    linear_alpha: float = 1.0
    multiplier: float = 1.0
    full_matrix: bool = True
    use_scalar: bool = False
    decompose_both: bool = False
    apply_preset: LokrPreset = field(default_factory=lambda: LokrPreset(target_module=("Attention",)))


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

    @property
    def effective_batch(self) -> int:
        """Samples in one optimiser step."""
        return self.batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    """When to save."""

    every_steps: int = 500
    keep: int = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationPrompt:
    """One prompt to draw."""

    name: str
    prompt: str


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
    num_images: int = 1
    disable_benchmark: bool = False
    adapter_strength: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSpec:
    """One training job as it was asked for."""

    name: str
    model: ModelChoice
    datasets: tuple[DatasetChoice, ...]
    adapter: LokrAdapter | None
    """None where the job names no adapter, which is a violation."""
    optimization: Optimization
    checkpoints: Checkpoints
    validation: Validation | None
    seed: int = 42
    trigger_words: tuple[str, ...] = ()


def spec_from_proto(message: job_pb2.TrainingJobSpec) -> JobSpec:
    """Return the domain form of a spec with every default filled in."""
    seed = message.seed if message.HasField("seed") else 42
    return JobSpec(
        name=message.name,
        model=ModelChoice(**_given(message.model)),
        datasets=tuple(DatasetChoice(**_given(dataset)) for dataset in message.datasets),
        adapter=_lokr_from_proto(message.adapter.lokr) if message.adapter.HasField("lokr") else None,
        optimization=_optimization_from_proto(message.optimization),
        checkpoints=Checkpoints(**_given(message.checkpoints)),
        validation=_validation_from_proto(message.validation, seed) if message.HasField("validation") else None,
        seed=seed,
        trigger_words=tuple(message.trigger_words),
    )


def spec_to_proto(spec: JobSpec) -> job_pb2.TrainingJobSpec:
    """Return the contract's form of a spec; every field that has a value is set."""
    message = job_pb2.TrainingJobSpec(name=spec.name, seed=spec.seed, trigger_words=spec.trigger_words)
    _fill(message.model, spec.model)
    for dataset in spec.datasets:
        _fill(message.datasets.add(), dataset)
    if spec.adapter is not None:
        _lokr_to_proto(message.adapter.lokr, spec.adapter)
    _fill(message.optimization, spec.optimization)
    _fill(message.checkpoints, spec.checkpoints)
    if spec.validation is not None:
        _validation_to_proto(message.validation, spec.validation)
    return message


def _optimization_from_proto(message: job_pb2.OptimizationSpec) -> Optimization:
    given = _given(message)
    given.setdefault("weight_decay", DEFAULT_WEIGHT_DECAY.get(given.get("optimizer", Optimization().optimizer)))
    return Optimization(**given)


def _validation_from_proto(message: job_pb2.ValidationSpec, job_seed: int) -> Validation:
    given = _given(message)
    given.setdefault("seed", job_seed)
    given["prompts"] = tuple(ValidationPrompt(name=item.name, prompt=item.prompt) for item in message.prompts)
    if message.resolutions:
        given["resolutions"] = tuple(message.resolutions)
    return Validation(**given)


def _validation_to_proto(message: job_pb2.ValidationSpec, validation: Validation) -> None:
    _fill(message, validation)
    message.resolutions.extend(validation.resolutions)
    for prompt in validation.prompts:
        message.prompts.add(name=prompt.name, prompt=prompt.prompt)


def _lokr_from_proto(message: job_pb2.LokrSpec) -> LokrAdapter:
    given = _given(message)
    if message.HasField("apply_preset"):
        given["apply_preset"] = _preset_from_proto(message.apply_preset)
    return LokrAdapter(**given)


def _lokr_to_proto(message: job_pb2.LokrSpec, adapter: LokrAdapter) -> None:
    _fill(message, adapter)
    preset = adapter.apply_preset
    message.apply_preset.SetInParent()
    _fill(message.apply_preset, preset)
    message.apply_preset.target_module.extend(preset.target_module)
    for class_name, overrides in preset.module_algo_map.items():
        _fill_present(message.apply_preset.module_algo_map[class_name], overrides)
    for pattern, overrides in preset.name_algo_map.items():
        _fill_present(message.apply_preset.name_algo_map[pattern], overrides)


def _preset_from_proto(message: job_pb2.LokrPreset) -> LokrPreset:
    return LokrPreset(
        target_module=tuple(message.target_module),
        module_algo_map=_overrides_by_name(message.module_algo_map),
        name_algo_map=_overrides_by_name(message.name_algo_map),
        **_given(message),
    )


def _overrides_by_name(overrides: Mapping[str, job_pb2.LokrOverrides]) -> dict[str, LokrOverrides]:
    # Protobuf maps have no order; sorting makes the choice between two patterns that match one module reproducible.
    return {name: LokrOverrides(**_given(overrides[name])) for name in sorted(overrides)}


def _given(message: Message) -> dict[str, Any]:
    """Return the singular scalar fields of a message by name, without optional ones that are unset."""
    return {
        field.name: getattr(message, field.name)
        for field in message.DESCRIPTOR.fields
        if not field.is_repeated
        and field.message_type is None
        and (not field.has_presence or message.HasField(field.name))
    }


def _fill(message: Message, value: Any) -> None:
    """Set the singular scalar fields of a message from a dataclass with the same field names."""
    for item in fields(value):
        descriptor = message.DESCRIPTOR.fields_by_name[item.name]
        content = getattr(value, item.name)
        if content is not None and not descriptor.is_repeated and descriptor.message_type is None:
            setattr(message, item.name, content)


def _fill_present(message: Message, value: Any) -> None:
    message.SetInParent()
    _fill(message, value)
