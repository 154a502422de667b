"""What may be said of the model and of memory."""

from collections.abc import Iterator

from reverie_common.errors import FieldViolation

from reverie_trainer.jobs.checks.rules import one_of
from reverie_trainer.jobs.spec import ModelChoice

FLAVOURS = ("full", "dev", "fast")
PRECISIONS = ("no_change", "int8-quanto")
MIXED_PRECISIONS = ("bf16", "no")


def check_model(model: ModelChoice) -> Iterator[FieldViolation]:
    """Yield what is wrong with the model."""
    yield from one_of("model.flavour", model.flavour, FLAVOURS)
    yield from one_of("model.base_precision", model.base_precision, PRECISIONS)
    yield from one_of("model.mixed_precision", model.mixed_precision, MIXED_PRECISIONS)
