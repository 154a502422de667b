"""What may be said of the model and of memory."""

from collections.abc import Iterator

from reverie_common.errors import FieldViolation
from reverie_hidream.precisions import QUANTIZE_VIA, refusal

from reverie_trainer.jobs.checks.rules import between, one_of, violation
from reverie_trainer.jobs.preparing.services import ENCODER_NAMES
from reverie_trainer.jobs.spec import FullRank, JobSpec, ModelChoice

FLAVOURS = ("full", "dev", "fast")
MIXED_PRECISIONS = ("bf16", "no")


def check_model(spec: JobSpec) -> Iterator[FieldViolation]:
    """Yield what is wrong with the model, and with what saves its memory."""
    model = spec.model
    yield from one_of("model.flavour", model.flavour, FLAVOURS)
    yield from one_of("model.mixed_precision", model.mixed_precision, MIXED_PRECISIONS)
    yield from one_of("model.quantize_via", model.quantize_via, QUANTIZE_VIA)
    problem = refusal(model.base_precision, is_trained_on=True)
    if problem is not None:
        yield violation("model.base_precision", problem)
    yield from _encoder_precisions(model)
    yield from _memory(spec)


def _encoder_precisions(model: ModelChoice) -> Iterator[FieldViolation]:
    names = tuple(ENCODER_NAMES.values())
    for encoder, precision in model.text_encoder_precision.items():
        path = f"model.text_encoder_precision[{encoder!r}]"
        yield from one_of(path, encoder, names)
        problem = refusal(precision, is_trained_on=False)
        if problem is not None:
            yield violation(path, problem)


def _memory(spec: JobSpec) -> Iterator[FieldViolation]:
    memory = spec.memory
    path = "memory.gradient_checkpointing_interval"
    yield from between(path, memory.gradient_checkpointing_interval, 1, 100, "blocks")
    if memory.gradient_checkpointing_interval > 1 and not spec.optimization.gradient_checkpointing:
        yield violation(
            path,
            f"{memory.gradient_checkpointing_interval} says which blocks are recomputed, but none is: leave it out, or "
            "set optimization.gradient_checkpointing",
        )
    if memory.num_offloaded_blocks and isinstance(spec.adapter, FullRank):
        yield violation(
            "memory.num_offloaded_blocks",
            f"{memory.num_offloaded_blocks} blocks cannot wait in host memory while they are trained themselves; set "
            "it to 0, or train an adapter",
        )
