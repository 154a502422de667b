"""What may be said of the optimiser, its learning rate, its clipping, and the running average."""

from collections.abc import Iterator

from reverie_common.errors import FieldViolation
from reverie_common.optimizer_catalogue import (
    CLIP_METHODS,
    CONSTANT_SCHEDULES,
    CYCLIC_SCHEDULES,
    SCHEDULES,
    OptimizerEntry,
    OptimizerOptionError,
    UnknownOptimizerError,
    find_optimizer,
    parse_options,
)

from reverie_trainer.jobs.checks.rules import between, one_of, real, violation
from reverie_trainer.jobs.spec import Ema, Optimization

EMA_VALIDATIONS = ("none", "ema_only", "comparison")

_PATH = "optimization"


def check_optimizer(optimization: Optimization) -> Iterator[FieldViolation]:
    """Yield what is wrong with the optimiser and everything that goes with it."""
    try:
        entry = find_optimizer(optimization.optimizer)
    except UnknownOptimizerError as error:
        yield violation(f"{_PATH}.optimizer", str(error))
    else:
        yield from _settings(optimization, entry)
        yield from _release(optimization, entry)
    if optimization.weight_decay is not None:
        yield from real(f"{_PATH}.weight_decay", optimization.weight_decay, at_least=0.0)
    yield from real(f"{_PATH}.max_grad_norm", optimization.max_grad_norm, at_least=0.0)
    yield from one_of(f"{_PATH}.grad_clip_method", optimization.grad_clip_method, CLIP_METHODS)
    yield from _schedule(optimization)


def check_ema(ema: Ema, max_steps: int) -> Iterator[FieldViolation]:
    """Yield what is wrong with the running average in a job of `max_steps`; 0 is not known yet."""
    if not 0.0 <= ema.decay < 1.0:
        yield violation("ema.decay", f"{ema.decay!r} is not at least 0 and below 1; 0.995 follows some 200 steps")
    yield from between("ema.update_interval", ema.update_interval, 1, 1_000_000, "optimiser steps")
    yield from between("ema.warmup_steps", ema.warmup_steps, 0, 1_000_000, "optimiser steps")
    yield from one_of("ema.validation", ema.validation, EMA_VALIDATIONS)
    for field in ("update_interval", "warmup_steps"):
        value = getattr(ema, field)
        if 0 < max_steps < value:
            never = "never be updated" if field == "update_interval" else "stay a copy of the adapter"
            yield violation(
                f"ema.{field}",
                f"{value} is above max_steps {max_steps}, and the average would {never}; lower it, or leave ema out",
            )


def _settings(optimization: Optimization, entry: OptimizerEntry) -> Iterator[FieldViolation]:
    for key in sorted(optimization.optimizer_config):
        try:
            parse_options(optimization.optimizer, {key: optimization.optimizer_config[key]})
        except OptimizerOptionError as error:
            yield violation(f"{_PATH}.optimizer_config[{key}]", str(error))
    for field, beta in (("beta1", optimization.beta1), ("beta2", optimization.beta2)):
        if beta is None:
            continue
        if entry.betas is None:
            yield violation(f"{_PATH}.{field}", f"{optimization.optimizer} has no {field}; leave it out")
        elif not 0.0 <= beta < 1.0:
            yield violation(f"{_PATH}.{field}", f"{beta!r} is not at least 0 and below 1")
    if entry.finds_rate and optimization.learning_rate != 1.0:
        yield violation(
            f"{_PATH}.learning_rate",
            f"{optimization.optimizer} finds the rate itself and {optimization.learning_rate:g} would only scale what "
            "it finds; leave it out or give 1, and scale by optimizer_config d_coef",
        )


def _release(optimization: Optimization, entry: OptimizerEntry) -> Iterator[FieldViolation]:
    """Refuse gradient release with what needs all gradients at once."""
    if not optimization.gradient_release:
        return
    path = f"{_PATH}.gradient_release"
    if not entry.can_release:
        yield violation(path, f"{optimization.optimizer} needs all gradients at once; set it to false, or use adamw")
    if optimization.gradient_accumulation_steps > 1:
        yield violation(
            path,
            f"gradient_accumulation_steps {optimization.gradient_accumulation_steps} would become as many steps; set "
            "one of both to its default",
        )
    if optimization.grad_clip_method == "norm" and optimization.max_grad_norm > 0:
        yield violation(path, "the norm needs all gradients at once; clip by value, or set max_grad_norm to 0")


def _schedule(optimization: Optimization) -> Iterator[FieldViolation]:
    schedule = optimization.lr_scheduler
    yield from real(f"{_PATH}.learning_rate", optimization.learning_rate, above=0.0, at_most=1.0)
    yield from between(f"{_PATH}.lr_warmup_steps", optimization.lr_warmup_steps, 0, 1_000_000, "optimiser steps")
    yield from one_of(f"{_PATH}.lr_scheduler", schedule, SCHEDULES)
    yield from real(f"{_PATH}.lr_end", optimization.lr_end, at_least=0.0, at_most=1.0)
    if schedule not in CONSTANT_SCHEDULES and optimization.learning_rate < optimization.lr_end <= 1.0:
        yield violation(
            f"{_PATH}.lr_end",
            f"{optimization.lr_end:g} is above learning_rate {optimization.learning_rate:g}, and rates fall; lower it",
        )
    yield from real(f"{_PATH}.lr_power", optimization.lr_power, above=0.0, at_most=100.0)
    yield from between(f"{_PATH}.lr_num_cycles", optimization.lr_num_cycles, 1, 1_000_000, "cycles")
    default = Optimization()
    if schedule in CONSTANT_SCHEDULES and optimization.lr_end != default.lr_end:
        yield violation(f"{_PATH}.lr_end", f"{schedule} has no end; use linear, cosine, polynomial or sine")
    if schedule != "polynomial" and optimization.lr_power != default.lr_power:
        yield violation(f"{_PATH}.lr_power", f"{schedule} has no exponent; use polynomial, or leave it out")
    if schedule not in CYCLIC_SCHEDULES and optimization.lr_num_cycles != default.lr_num_cycles:
        yield violation(
            f"{_PATH}.lr_num_cycles", f"{schedule} has no cycles; use cosine_with_restarts or sine, or leave it out"
        )
