"""How long, with which optimiser, at which rate (spec 5.2, 5.4 to 5.8)."""

import math
from dataclasses import replace
from typing import Any

from reverie_common.optimizer_catalogue import (
    CATALOGUE,
    REFUSED,
    OptimizerOptionError,
    UnknownOptimizerError,
    find_optimizer,
    parse_options,
)

from reverie_client.simpletuner.rules import (
    UNSET,
    Given,
    Option,
    Scope,
    choice,
    custom,
    flag,
    ignored,
    number,
    parse_number,
    refused,
    when,
    words,
)

REFUSED_OPTIMIZERS = {name: nearest for name, (_, nearest) in REFUSED.items()}

UNCLIPPED = ("optimi-stableadamw", "prodigy")
"""Optimisers for which SimpleTuner leaves clipping out."""

REAL_SCHEDULES = ("cosine", "sine", "cosine_with_restarts")
"""Schedules of which SimpleTuner takes the warm-up as the period."""

ENDED_SCHEDULES = ("polynomial", "cosine", "sine", "cosine_with_restarts")
DEFAULT_OPTIMIZER = "adamw_bf16"
IMPLEMENTATION_SETTINGS = ("kahan_sum", "foreach", "fused")
"""Settings of how a step is computed, which change no result that one could want."""


def _steps(scope: Scope, given: Given) -> None:
    value = parse_number(given.value, is_whole=True)
    if value is None:
        scope.refuse(given, "it is not a whole number")
    elif value > 0:
        scope.honour(given, "optimization.max_steps", int(value))
    else:
        scope.ignore(given, "num_train_epochs says how long")


def _epochs(scope: Scope, given: Given) -> None:
    value = parse_number(given.value, is_whole=True)
    steps = parse_number(scope.value("max_train_steps", 0), is_whole=True) or 0
    if value is None:
        scope.refuse(given, "it is not a whole number")
    elif value > 0 and steps > 0:
        scope.refuse(given, f"max_train_steps {steps} is given too", "set one of both to 0; the steps were taken")
    elif value > 0:
        scope.honour(given, "optimization.num_epochs", int(value))
    elif steps > 0:
        scope.ignore(given, "max_train_steps says how long")
    else:
        scope.refuse(given, "nothing says how long to train", "give max_train_steps or num_train_epochs")


def _has_no_steps(scope: Scope) -> bool:
    return not parse_number(scope.value("max_train_steps", 0), is_whole=True)


def _optimizer(scope: Scope, given: Given) -> None:
    name = str(given.value)
    try:
        find_optimizer(name)
    except UnknownOptimizerError as error:
        scope.refuse(given, str(error))
    else:
        scope.honour(given, "optimization.optimizer", name)


def _optimizer_config(scope: Scope, given: Given) -> None:
    """Take `k=v,k=v` apart; what has a field of its own goes there."""
    name = str(scope.value("optimizer", DEFAULT_OPTIMIZER))
    settings, problems = _settings(str(given.value))
    notes: list[str] = []
    for field in ("weight_decay", "beta1", "beta2"):
        if field in settings:
            scope.draft.put(f"optimization.{field}", float(settings.pop(field)))
            notes.append(f"{field} has a field of its own")
    for key in [key for key in settings if key in IMPLEMENTATION_SETTINGS]:
        notes.append(f"{key}={settings.pop(key)} is left out, because it changes how a step is computed, not which")
    for key in list(settings):
        problems += _problem(name, key, settings[key])
    if problems:
        scope.refuse(given, "; ".join(problems))
    elif notes:
        scope.change(given, "optimization.optimizer_config", settings, "; ".join(notes))
    else:
        scope.honour(given, "optimization.optimizer_config", settings)


def _settings(text: str) -> tuple[dict[str, str], list[str]]:
    settings: dict[str, str] = {}
    problems: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = part.partition("=")
        if equals:
            settings[key.strip()] = value.strip()
        else:
            problems.append(f"{part!r} is not NAME=VALUE; give betas as optimizer_beta1 and optimizer_beta2")
    for field in ("weight_decay", "beta1", "beta2"):
        if field in settings and parse_number(settings[field]) is None:
            problems.append(f"{field} {settings.pop(field)!r} is not a number")
    return settings, problems


def _problem(name: str, key: str, value: str) -> list[str]:
    if name not in CATALOGUE:
        return []
    try:
        parse_options(name, {key: value})
    except OptimizerOptionError as error:
        return [str(error)]
    return []


def _learning_rate(scope: Scope, given: Given) -> None:
    rate = parse_number(given.value)
    if rate is None or not rate > 0:
        scope.refuse(given, "it is not a number above 0")
        return
    entry = CATALOGUE.get(str(scope.value("optimizer", DEFAULT_OPTIMIZER)))
    if entry is not None and entry.finds_rate:
        scope.change(
            given, "optimization.learning_rate", 1.0, "the optimiser finds the rate itself, in SimpleTuner too"
        )
        return
    factor = lr_factor(scope)
    if factor == 1.0:
        scope.honour(given, "optimization.learning_rate", float(rate))
    else:
        scope.change(given, "optimization.learning_rate", float(rate * factor), f"times {factor:g}, by lr_scale")


def lr_factor(scope: Scope) -> float:
    """What lr_scale multiplies the rate by: samples in one optimiser step, or their square root."""
    if not scope.is_on("lr_scale"):
        return 1.0
    batch = parse_number(scope.value("train_batch_size", 4), is_whole=True) or 1
    steps = parse_number(scope.value("gradient_accumulation_steps", 1), is_whole=True) or 1
    return math.sqrt(batch * steps) if scope.is_on("lr_scale_sqrt") else float(batch * steps)


def _in_the_rate(scope: Scope, given: Given) -> None:
    scope.honour(given, "optimization.learning_rate", UNSET, "worked into the rate")


def _scheduler(scope: Scope, given: Given) -> None:
    name = {"cosine_with_warmup": "cosine"}.get(str(given.value), str(given.value))
    path = "optimization.lr_scheduler"
    warmup = parse_number(scope.value("lr_warmup_steps", 0)) or 0
    if name in REAL_SCHEDULES:
        scope.change(
            given,
            path,
            name,
            "a real one over the whole job after a warm-up; SimpleTuner's takes the warm-up as its period",
        )
    elif name == "constant" and warmup > 0:
        scope.change(given, path, "constant_with_warmup", "because lr_warmup_steps is given, in SimpleTuner too")
    else:
        choice("lr_scheduler", path, ("constant", "constant_with_warmup", "linear", "polynomial")).apply(scope, given)


def _schedule(*names: str) -> Any:
    return lambda scope: (
        {"cosine_with_warmup": "cosine"}.get(
            str(scope.value("lr_scheduler", "constant_with_warmup")), scope.value("lr_scheduler")
        )
        in names
    )


def _clip(scope: Scope, given: Given) -> None:
    if scope.value("optimizer") in UNCLIPPED:
        scope.change(given, "optimization.max_grad_norm", 0.0, "no clipping with this optimiser, in SimpleTuner too")
    else:
        number("max_grad_norm", "optimization.max_grad_norm", low=0.0).apply(scope, given)


def _interval(scope: Scope, given: Given) -> None:
    value = parse_number(given.value, is_whole=True)
    if value is None or not 0 <= value <= 100:
        scope.refuse(given, "it is not a whole number from 0 to 100")
    elif value <= 1:
        scope.ignore(given, "every block is recomputed, which is the default")
    elif not scope.is_on("gradient_checkpointing", default=True):
        scope.ignore(given, "gradient_checkpointing is off")
    else:
        scope.honour(given, "memory.gradient_checkpointing_interval", int(value))


def _beta(number_of: int) -> Option:
    path = f"optimization.beta{number_of}"
    plain = number(f"optimizer_beta{number_of}", path, low=0.0, high=0.999999, aliases=(f"adam_beta{number_of}",))

    def apply(scope: Scope, given: Given) -> None:
        entry = CATALOGUE.get(str(scope.value("optimizer", DEFAULT_OPTIMIZER)))
        if entry is not None and entry.betas is None:
            scope.ignore(given, "the optimiser has none")
        else:
            plain.apply(scope, given)

    return replace(plain, apply=apply)


def _release(scope: Scope, given: Given) -> None:
    is_split = (parse_number(scope.value("gradient_accumulation_steps", 1)) or 1) > 1
    is_norm = scope.value("grad_clip_method") == "norm" and parse_number(scope.value("max_grad_norm", 2.0)) != 0
    entry = CATALOGUE.get(str(scope.value("optimizer", DEFAULT_OPTIMIZER)))
    if scope.is_on("optimizer_release_gradients") and (is_split or is_norm):
        other = "gradient_accumulation_steps" if is_split else "grad_clip_method norm"
        scope.refuse(given, f"{other} needs all gradients at once", "set one of both to its default")
        return
    if scope.is_on("optimizer_release_gradients") and entry is not None and not entry.can_release:
        scope.refuse(given, "the optimiser needs all gradients at once", "the nearest that works is optimizer adamw")
        return
    flag(
        "optimizer_release_gradients",
        "optimization.gradient_release",
        "it reaches the adapter here; in SimpleTuner no LyCORIS parameter is ever stepped",
    ).apply(scope, given)


TRAINING: tuple[Option, ...] = (
    custom("max_train_steps", _steps, "honoured", "optimization.max_steps"),
    Option(
        name="num_train_epochs",
        apply=_epochs,
        outcome="honoured",
        field="optimization.num_epochs",
        note="exactly one of both lengths may be above 0",
        default=1,
        is_default_needed=_has_no_steps,
    ),
    number("train_batch_size", "optimization.batch_size", low=1, high=128, is_whole=True, default=4),
    number("gradient_accumulation_steps", "optimization.gradient_accumulation_steps", low=1, high=1024, is_whole=True),
    custom(
        "optimizer",
        _optimizer,
        "honoured",
        "optimization.optimizer",
        f"{words(CATALOGUE, REFUSED_OPTIMIZERS)}, and deepspeed-*, each with the nearest that works",
        default=DEFAULT_OPTIMIZER,
    ),
    _beta(1),
    _beta(2),
    number("adam_weight_decay", "optimization.weight_decay", low=0.0, aliases=("weight_decay",)),
    custom(
        "optimizer_config",
        _optimizer_config,
        "honoured",
        "optimization.optimizer_config",
        "weight decay and betas go into their own fields",
    ),
    custom(
        "optimizer_release_gradients",
        _release,
        "honoured",
        "optimization.gradient_release",
        "it reaches the adapter here; in SimpleTuner no LyCORIS parameter is ever stepped",
    ),
    ignored("fuse_optimizer", "it belongs to an optimiser on the CPU that is not offered"),
    ignored("optimizer_foreach_disable", "it changes how a step is computed, not which"),
    refused(
        "optimizer_cpu_offload_method",
        "the state of an adapter's optimiser is some 50 MB and stays on the card",
        "leave it out",
    ),
    refused(
        "optimizer_offload_gradients", "the gradients of an adapter are small and stay on the card", "leave it out"
    ),
    custom(
        "learning_rate",
        _learning_rate,
        "honoured",
        "optimization.learning_rate",
        "1 where the optimiser finds it",
        default=4e-7,
    ),
    *when(
        lambda scope: scope.is_on("lr_scale"),
        "lr_scale is off",
        (custom("lr_scale_sqrt", _in_the_rate, "honoured", "optimization.learning_rate", "worked into the rate"),),
    ),
    custom(
        "lr_scale",
        lambda scope, given: (
            _in_the_rate(scope, given) if scope.is_on("lr_scale") else scope.ignore(given, "it is off")
        ),
        "honoured",
        "optimization.learning_rate",
        "worked into the rate: times the samples of one step",
    ),
    custom(
        "lr_scheduler",
        _scheduler,
        "honoured",
        "optimization.lr_scheduler",
        "cosine, sine and cosine_with_restarts are changed: real ones, after a real warm-up",
    ),
    number("lr_warmup_steps", "optimization.lr_warmup_steps", low=0, high=1_000_000, is_whole=True),
    *when(
        _schedule("polynomial"),
        "lr_scheduler is not polynomial",
        (number("lr_power", "optimization.lr_power", low=1e-9, high=100.0),),
    ),
    *when(
        _schedule("cosine_with_restarts", "sine"),
        "lr_scheduler has no cycles",
        (number("lr_num_cycles", "optimization.lr_num_cycles", low=1, high=1_000_000, is_whole=True),),
    ),
    *when(
        _schedule(*ENDED_SCHEDULES),
        "lr_scheduler has no end",
        (number("lr_end", "optimization.lr_end", low=0.0, high=1.0, default=4e-7),),
    ),
    Option(
        name="max_grad_norm",
        apply=_clip,
        outcome="honoured",
        field="optimization.max_grad_norm",
        note="0 with optimi-stableadamw and prodigy, as there",
        default=2.0,
        is_default_needed=lambda scope: scope.value("optimizer") in UNCLIPPED,
    ),
    choice("grad_clip_method", "optimization.grad_clip_method", ("value", "norm")),
    flag("gradient_checkpointing", "optimization.gradient_checkpointing"),
    custom("gradient_checkpointing_interval", _interval, "honoured", "memory.gradient_checkpointing_interval"),
    refused(
        "gradient_checkpointing_segment_stride",
        "only whole intervals are offered",
        "use gradient_checkpointing_interval",
    ),
    refused("gradient_checkpointing_backend", "activations stay on the card", "use torch", off=(None, "", "torch")),
    ignored("gradient_precision", "gradients are accumulated in float32"),
    *when(
        lambda scope: scope.is_on("use_ema"),
        "use_ema is off",
        (
            number(
                "ema_decay",
                "ema.decay",
                "in float32; SimpleTuner's average is bfloat16 and stops following",
                low=0.0,
                high=0.999999999,
            ),
            number("ema_update_interval", "ema.update_interval", low=1, high=1_000_000, is_whole=True),
            number("ema_warmup_steps", "ema.warmup_steps", low=0, high=1_000_000, is_whole=True),
            choice("ema_validation", "ema.validation", ("none", "ema_only", "comparison")),
        ),
    ),
    custom("use_ema", lambda scope, given: _ema(scope, given), "honoured", "ema"),
    ignored("ema_device", "the average lies beside the adapter: 26 MB"),
    ignored("ema_cpu_only", "the average lies beside the adapter: 26 MB"),
    ignored("ema_foreach_disable", "it changes how the average is computed, not which"),
    custom(
        "seed",
        lambda scope, given: _seed(scope, given),
        "honoured",
        "seed",
        "0 (by the clock) and -1 (random) become a number that is drawn now",
    ),
    ignored("seed_for_each_device", "one card trains a job"),
)


def _ema(scope: Scope, given: Given) -> None:
    if not scope.is_on("use_ema"):
        scope.ignore(given, "it is off")
    else:
        scope.honour(given, "ema", scope.draft.get("ema") or {}, "an average in float32, exported beside the adapter")


def _seed(scope: Scope, given: Given) -> None:
    value = given.value if isinstance(given.value, int) else parse_number(given.value, is_whole=True)
    if value is None or isinstance(value, bool) or not -1 <= value < 2**64:
        scope.refuse(given, "it is not a whole number from -1 to 2^64 - 1")
    elif value in (0, -1):
        drawn = scope.draft.draw_seed()
        scope.change(given, "seed", drawn, "drawn now and written down, so that the job can be repeated")
    else:
        scope.honour(given, "seed", int(value))
