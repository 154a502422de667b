"""A whole job, and the way to and from the contract's message."""

from dataclasses import dataclass, field, replace

from reverie.training.v1 import job_pb2
from reverie_common.optimizer_catalogue import CATALOGUE

from reverie_trainer.jobs.spec.adapter import KINDS, Adapter, LoraAdapter
from reverie_trainer.jobs.spec.convert import fill_message, from_message
from reverie_trainer.jobs.spec.data import DatasetChoice
from reverie_trainer.jobs.spec.measures import Ema, Evaluation
from reverie_trainer.jobs.spec.model import Memory, ModelChoice
from reverie_trainer.jobs.spec.optimization import Optimization
from reverie_trainer.jobs.spec.outlets import Publishing, Tracking, Webhook
from reverie_trainer.jobs.spec.validation import Validation


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    """When to save."""

    every_steps: int = 500
    keep: int = 5
    every_epochs: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Another job's checkpoint to begin at."""

    job_id: str = ""
    step: int = 0
    """0 is the newest."""
    adapter_only: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSpec:
    """One training job as it was asked for."""

    name: str = ""
    model: ModelChoice = field(default_factory=ModelChoice)
    datasets: tuple[DatasetChoice, ...] = ()
    adapter: Adapter | None = None
    """None where the job names no adapter, which is a violation."""
    optimization: Optimization = field(default_factory=Optimization)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    validation: Validation | None = None
    seed: int = 42
    trigger_words: tuple[str, ...] = ()
    ema: Ema | None = None
    evaluation: Evaluation | None = None
    memory: Memory = field(default_factory=Memory)
    tracking: Tracking = field(default_factory=Tracking)
    publishing: Publishing | None = None
    webhooks: tuple[Webhook, ...] = ()
    embedding_storage: str = "exact"
    aspect_bucket_rounding: int = 2
    dataset_sampling: str = "auto"
    allow_dataset_oversubscription: bool = False
    start: Start | None = None


def spec_from_proto(message: job_pb2.TrainingJobSpec) -> JobSpec:
    """Return the domain form of a spec with every default filled in."""
    # The adapter is a choice between messages, which the names of fields alone cannot carry.
    plain = job_pb2.TrainingJobSpec()
    plain.CopyFrom(message)
    plain.ClearField("adapter")
    spec = from_message(plain, JobSpec)
    validation = spec.validation
    if validation is not None and not message.validation.HasField("seed"):
        validation = replace(validation, seed=spec.seed)
    return replace(
        spec,
        adapter=_adapter_from_proto(message.adapter),
        optimization=_with_optimizer_defaults(spec.optimization, message.optimization),
        validation=validation,
        tracking=replace(spec.tracking, run_name=spec.tracking.run_name or spec.name),
    )


def spec_to_proto(spec: JobSpec) -> job_pb2.TrainingJobSpec:
    """Return the contract's form of a spec; every field that has a value is set."""
    message = job_pb2.TrainingJobSpec()
    fill_message(message, replace(spec, adapter=None))
    kind = next((name for name, record in KINDS.items() if isinstance(spec.adapter, record)), None)
    if kind is not None:
        getattr(message.adapter, kind).SetInParent()
        fill_message(getattr(message.adapter, kind), spec.adapter)
    return message


def _adapter_from_proto(message: job_pb2.AdapterSpec) -> Adapter | None:
    kind = message.WhichOneof("kind")
    if kind is None:
        return None
    adapter = from_message(getattr(message, kind), KINDS[kind])
    if isinstance(adapter, LoraAdapter) and adapter.alpha is None:
        return replace(adapter, alpha=float(adapter.rank))
    return adapter


def _with_optimizer_defaults(optimization: Optimization, message: job_pb2.OptimizationSpec) -> Optimization:
    """Fill in what the optimiser decides where the job does not; an unknown one decides nothing."""
    entry = CATALOGUE.get(optimization.optimizer)
    if entry is None:
        return optimization
    if optimization.weight_decay is None:
        optimization = replace(optimization, weight_decay=entry.weight_decay)
    if not message.HasField("learning_rate"):
        optimization = replace(optimization, learning_rate=entry.learning_rate)
    return optimization
