"""What may be said of the training itself."""

from collections.abc import Iterator

from reverie_common.errors import FieldViolation

from reverie_trainer.jobs.checks.rules import between, one_of, positive, real
from reverie_trainer.jobs.spec import Optimization

OPTIMIZERS = ("adamw", "optimi-lion")
SCHEDULERS = ("constant_with_warmup", "cosine")
CLIP_METHODS = ("value", "norm")


def check_optimization(optimization: Optimization) -> Iterator[FieldViolation]:
    """Yield what is wrong with the optimisation."""
    path = "optimization"
    yield from between(f"{path}.max_steps", optimization.max_steps, 1, 1_000_000, "optimiser steps")
    yield from between(f"{path}.batch_size", optimization.batch_size, 1, 128, "samples")
    yield from between(f"{path}.gradient_accumulation_steps", optimization.gradient_accumulation_steps, 1, 1024)
    yield from one_of(f"{path}.optimizer", optimization.optimizer, OPTIMIZERS)
    yield from real(f"{path}.learning_rate", optimization.learning_rate, above=0.0, at_most=1.0)
    yield from between(f"{path}.lr_warmup_steps", optimization.lr_warmup_steps, 0, 1_000_000, "optimiser steps")
    yield from one_of(f"{path}.lr_scheduler", optimization.lr_scheduler, SCHEDULERS)
    if optimization.weight_decay is not None:
        yield from real(f"{path}.weight_decay", optimization.weight_decay, at_least=0.0)
    yield from real(f"{path}.max_grad_norm", optimization.max_grad_norm, at_least=0.0)
    yield from one_of(f"{path}.grad_clip_method", optimization.grad_clip_method, CLIP_METHODS)
    yield from positive(f"{path}.flow_schedule_shift", optimization.flow_schedule_shift)
    yield from positive(f"{path}.flow_sigmoid_scale", optimization.flow_sigmoid_scale)
    dropout = optimization.caption_dropout_probability
    yield from real(f"{path}.caption_dropout_probability", dropout, at_least=0.0, at_most=1.0)
