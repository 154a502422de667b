"""What may be said of the training itself."""

from collections.abc import Iterator

from reverie_common.errors import FieldViolation

from reverie_trainer.jobs.checks.optimizers import check_optimizer
from reverie_trainer.jobs.checks.rules import between, real
from reverie_trainer.jobs.spec import Optimization


def check_optimization(optimization: Optimization) -> Iterator[FieldViolation]:
    """Yield what is wrong with the optimisation."""
    path = "optimization"
    yield from between(f"{path}.batch_size", optimization.batch_size, 1, 128, "samples")
    yield from between(f"{path}.gradient_accumulation_steps", optimization.gradient_accumulation_steps, 1, 1024)
    yield from check_optimizer(optimization)
    dropout = optimization.caption_dropout_probability
    yield from real(f"{path}.caption_dropout_probability", dropout, at_least=0.0, at_most=1.0)
