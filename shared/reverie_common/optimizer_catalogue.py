"""Every optimiser and learning-rate schedule by name: library, defaults, settings, cost, refusals (spec 5.4, 5.5).

Free of torch, so that the job API checks a job against the same table that the worker builds its optimiser from.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

OptionValue: TypeAlias = float | int | bool


class UnknownOptimizerError(ValueError):
    """No such optimiser, or one that is refused; the message names the nearest that works."""


class OptimizerOptionError(ValueError):
    """A setting that the optimiser does not have, or a value that it does not take."""

    def __init__(self, key: str, message: str) -> None:
        """Keep which setting it is."""
        super().__init__(message)
        self.key = key


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One setting of an optimiser."""

    default: OptionValue
    """Its type is the type of the setting."""
    above: float | None = None
    at_least: float | None = None
    below: float | None = None

    @property
    def kind(self) -> str:
        """How the docs call its type."""
        return {bool: "true or false", int: "whole number", float: "number"}[type(self.default)]

    def parse(self, text: str) -> OptionValue:
        """Read a value.

        Raises:
            ValueError: it is of another type or out of range; the message says what is expected.
        """
        value = _PARSERS[type(self.default)](text.strip().lower())
        if not self._allows(value):
            raise ValueError(text)
        return value

    def describe(self) -> str:
        """What a value must be."""
        bounds = (("above", self.above), ("at least", self.at_least), ("below", self.below))
        limits = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        return f"a {self.kind} {limits}".rstrip() if self.kind != "true or false" else self.kind

    def _allows(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
        )


def _parse_bool(text: str) -> bool:
    return {"true": True, "false": False, "1": True, "0": False}[text]


_PARSERS: Mapping[type, type[float] | type[int]] = {bool: _parse_bool, int: int, float: float}  # type: ignore[dict-item]  # a function that makes them


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerEntry:
    """One optimiser."""

    library: str
    """The package that implements it, as pip calls it."""
    betas: tuple[float, float] | None
    """Defaults of beta1 and beta2; None where it has none."""
    weight_decay: float
    """Default; decoupled from the gradient unless the notes say otherwise."""
    state_bytes: float
    """Of state per parameter for large tensors, measured by a test; gradient and weight come on top."""
    options: Mapping[str, Option] = field(default_factory=dict)
    """What `optimizer_config` may hold, besides betas and weight decay, which have fields of their own."""
    dtype: str = "float32"
    """What the adapter's parameters are held in."""
    learning_rate: float = 1e-4
    """Default; 1.0 where the optimiser finds the rate itself and what is given is only a factor."""
    finds_rate: bool = False
    """Whether the learning rate must stay 1.0."""
    is_schedule_free: bool = False
    """Whether training and averaged weights differ; exports and pictures take the averaged."""
    can_release: bool = True
    """Whether each parameter can take its step apart from the others (gradient release)."""
    notes: str = ""


_EPS8, _EPS6 = Option(default=1e-8, above=0.0), Option(default=1e-6, above=0.0)
_OFF, _ON = Option(default=False), Option(default=True)
_BETA = {"at_least": 0.0, "below": 1.0}
_OPTIMI = {"eps": _EPS6, "decouple_lr": _OFF}
_BITS = {"min_8bit_size": Option(default=4096, at_least=0)}


def _torch_adamw() -> OptimizerEntry:
    return OptimizerEntry(
        library="torch",
        betas=(0.9, 0.999),
        weight_decay=0.01,
        state_bytes=8,
        options={"eps": _EPS8, "amsgrad": _OFF},
        notes="one kernel for all parameters",
    )


def _optimi(
    weight_decay: float,
    state_bytes: float,
    options: Mapping[str, Option],
    betas: tuple[float, float] | None = (0.9, 0.99),
    notes: str = "",
) -> OptimizerEntry:
    return OptimizerEntry(
        library="torch-optimi",
        betas=betas,
        weight_decay=weight_decay,
        state_bytes=state_bytes,
        options=options,
        notes=notes,
    )


def _bitsandbytes(kind: str, *, is_8bit: bool, notes: str) -> OptimizerEntry:
    defaults = {
        "adamw": ((0.9, 0.999), 0.01, {"eps": _EPS8}, 8.0, 2.03125),
        "lion": ((0.9, 0.99), 0.0, {}, 4.0, 1.015625),
        "ademamix": (
            (0.9, 0.999),
            0.01,
            {
                "eps": _EPS8,
                "beta3": Option(default=0.9999, **_BETA),
                "alpha": Option(default=5.0, at_least=0.0),
                "t_alpha": Option(default=0, at_least=0),
                "t_beta3": Option(default=0, at_least=0),
            },
            12.0,
            3.046875,
        ),
    }
    betas, weight_decay, options, full, eighth = defaults[kind]
    return OptimizerEntry(
        library="bitsandbytes",
        betas=betas,
        weight_decay=weight_decay,
        state_bytes=eighth if is_8bit else full,
        options={**options, **(_BITS if is_8bit else {})},
        notes=notes,
    )


def _schedule_free(betas: tuple[float, float], state_bytes: float, options: Mapping[str, Option]) -> OptimizerEntry:
    return OptimizerEntry(
        library="schedulefree",
        betas=betas,
        weight_decay=0.0,
        state_bytes=state_bytes,
        options={
            "r": Option(default=0.0, at_least=0.0),
            "weight_lr_power": Option(default=2.0, at_least=0.0),
            **options,
        },
        is_schedule_free=True,
        notes="averages its own weights: use a constant schedule",
    )


def _torchao(state_bytes: float, notes: str) -> OptimizerEntry:
    return OptimizerEntry(
        library="torchao",
        betas=(0.9, 0.999),
        weight_decay=0.01,
        state_bytes=state_bytes,
        options={"eps": _EPS8, "amsgrad": _OFF},
        notes=notes,
    )


_PRODIGY_OPTIONS = {
    "beta3": Option(default=0.0, **_BETA),
    "d0": Option(default=1e-6, above=0.0),
    "d_coef": Option(default=1.0, above=0.0),
    "d_limiter": _ON,
    "prodigy_steps": Option(default=0, at_least=0),
    "schedulefree_c": Option(default=0.0, at_least=0.0),
    "eps": _EPS8,
    "factored": _ON,
    "use_bias_correction": _OFF,
    "use_stableadamw": _ON,
    "use_schedulefree": _ON,
    "use_speed": _OFF,
    "use_cautious": _OFF,
    "use_grams": _OFF,
    "use_adopt": _OFF,
    "use_orthograd": _OFF,
    "use_focus": _OFF,
    "weight_decay_by_lr": _ON,
}

_8BIT = "state in 8 bits for tensors of min_8bit_size elements and more"
_PAGED = "state may leave the GPU when its memory is full; on a CPU as the one that is not paged"

CATALOGUE: Mapping[str, OptimizerEntry] = {
    "adamw": _torch_adamw(),
    "torch-adamw": _torch_adamw(),
    "optimi-lion": _optimi(
        0.0, 4, {"decouple_lr": _OFF}, notes="steps by sign: use a third to a tenth of AdamW's rate"
    ),
    "optimi-adamw": _optimi(0.01, 8, _OPTIMI),
    "optimi-stableadamw": _optimi(0.01, 8, _OPTIMI, notes="limits each tensor's step by its RMS; needs no clipping"),
    "optimi-adan": _optimi(
        0.02,
        16,
        {**_OPTIMI, "beta3": Option(default=0.99, **_BETA), "adam_wd": _OFF},
        betas=(0.98, 0.92),
    ),
    "optimi-radam": _optimi(0.0, 8, {**_OPTIMI, "decouple_wd": _OFF}, notes="weight decay is added to the gradient"),
    "optimi-ranger": _optimi(
        0.0,
        12,
        {
            **_OPTIMI,
            "decouple_wd": _ON,
            "k": Option(default=6, at_least=1),
            "alpha": Option(default=0.5, above=0.0, below=1.0),
        },
    ),
    "optimi-sgd": _optimi(
        0.0,
        0,
        {"momentum": Option(default=0.0, **_BETA), "dampening": _OFF, "decouple_wd": _OFF, "decouple_lr": _OFF},
        betas=None,
        notes="4 bytes of state with momentum; weight decay is added to the gradient",
    ),
    "bnb-adamw": _bitsandbytes("adamw", is_8bit=False, notes=""),
    "bnb-adamw8bit": _bitsandbytes("adamw", is_8bit=True, notes=_8BIT),
    "bnb-adamw-paged": _bitsandbytes("adamw", is_8bit=False, notes=_PAGED),
    "bnb-adamw8bit-paged": _bitsandbytes("adamw", is_8bit=True, notes=f"{_8BIT}; {_PAGED}"),
    "bnb-lion": _bitsandbytes("lion", is_8bit=False, notes=""),
    "bnb-lion8bit": _bitsandbytes("lion", is_8bit=True, notes=_8BIT),
    "bnb-lion-paged": _bitsandbytes("lion", is_8bit=False, notes=_PAGED),
    "bnb-lion8bit-paged": _bitsandbytes("lion", is_8bit=True, notes=f"{_8BIT}; {_PAGED}"),
    "bnb-ademamix": _bitsandbytes("ademamix", is_8bit=False, notes="a second, slow average of the gradient"),
    "bnb-ademamix8bit": _bitsandbytes("ademamix", is_8bit=True, notes=_8BIT),
    "prodigy": OptimizerEntry(
        library="prodigy-plus-schedule-free",
        betas=(0.9, 0.99),
        weight_decay=0.0,
        state_bytes=4.41,
        options=_PRODIGY_OPTIONS,
        learning_rate=1.0,
        finds_rate=True,
        is_schedule_free=True,
        can_release=False,
        notes="finds the learning rate; scale it by d_coef. Averages its own weights: use a constant schedule",
    ),
    "adamw_schedulefree": _schedule_free((0.9, 0.999), 8, {"eps": _EPS8}),
    "adamw_schedulefree+no_kahan": _schedule_free((0.9, 0.999), 8, {"eps": _EPS8}),
    "radam_schedulefree": _schedule_free((0.9, 0.999), 8, {"eps": _EPS8}),
    "adamw_bf16": OptimizerEntry(
        library="torchao",
        betas=(0.9, 0.999),
        weight_decay=0.01,
        state_bytes=8,
        options={"eps": _EPS6},
        dtype="bfloat16",
        notes="adapter weights and gradients in bfloat16, rounded stochastically; moments in float32",
    ),
    "ao-adamw8bit": _torchao(2.03125, "state in 8 bits for tensors of 4096 elements and more"),
    "ao-adamw4bit": _torchao(1.0625, "state in 4 bits for tensors of 4096 elements and more"),
    "ao-adamwfp8": _torchao(2.03125, "state in fp8 for tensors of 4096 elements and more"),
    "soap": OptimizerEntry(
        library="pytorch_optimizer",
        betas=(0.95, 0.95),
        weight_decay=0.01,
        state_bytes=24,
        options={
            "eps": _EPS8,
            "precondition_frequency": Option(default=10, at_least=1),
            "max_precondition_dim": Option(default=10000, at_least=1),
            "correct_bias": _ON,
            "normalize_gradient": _OFF,
        },
        notes="two square matrices for each side of a tensor: 24 bytes for a square one, far more for a long one",
    ),
    "muon": OptimizerEntry(
        library="pytorch_optimizer",
        betas=None,
        weight_decay=0.0,
        state_bytes=4,
        options={
            "momentum": Option(default=0.95, **_BETA),
            "nesterov": _ON,
            "ns_steps": Option(default=5, at_least=1),
            "adamw_eps": Option(default=1e-10, above=0.0),
        },
        can_release=False,
        notes="matrices by orthogonalised momentum, scaled to AdamW's step; vectors and scalars by AdamW (0.9, 0.95)",
    ),
}
"""In the order of the docs."""

REFUSED: Mapping[str, tuple[str, str]] = {
    "dadaptation": ("it is not kept up", "prodigy"),
    "adafactor": ("its factored second moment saves nothing at an adapter's size", "bnb-adamw8bit"),
    "adamw8bit": ("it has been replaced", "bnb-adamw8bit"),
    "adamw_schedulefree+aggressive": ("its settings are part of no kept library", "adamw_schedulefree"),
    "ao-adamfp8": ("its weight decay is not decoupled", "ao-adamwfp8"),
    "ao-adam8bit": ("its weight decay is not decoupled", "ao-adamw8bit"),
    "ao-adam4bit": ("its weight decay is not decoupled", "ao-adamw4bit"),
    "bnb-adam": ("its weight decay is decoupled all the same", "bnb-adamw"),
    "bnb-adam8bit": ("its weight decay is decoupled all the same", "bnb-adamw8bit"),
    "bnb-adam-paged": ("its weight decay is decoupled all the same", "bnb-adamw-paged"),
    "bnb-adam8bit-paged": ("its weight decay is decoupled all the same", "bnb-adamw8bit-paged"),
    "torch-adafactor": ("its factored second moment saves nothing at an adapter's size", "bnb-adamw8bit"),
    "torch-adam": ("its weight decay is not decoupled", "torch-adamw"),
}
"""Names that people know from elsewhere: why not, and what works in their place."""


SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "sine")
CONSTANT_SCHEDULES = frozenset({"constant", "constant_with_warmup"})
"""They stay at the full rate; both warm up first where the job wants it."""
CYCLIC_SCHEDULES = frozenset({"cosine_with_restarts", "sine"})

CLIP_METHODS = ("value", "norm")


def find_optimizer(name: str) -> OptimizerEntry:
    """Look an optimiser up.

    Raises:
        UnknownOptimizerError: there is no such optimiser, or it is refused.
    """
    entry = CATALOGUE.get(name)
    if entry is None:
        raise UnknownOptimizerError(_refusal(name))
    return entry


def parse_options(name: str, config: Mapping[str, str]) -> dict[str, OptionValue]:
    """Read the settings of an optimiser.

    Raises:
        UnknownOptimizerError: there is no such optimiser.
        OptimizerOptionError: it has no such setting, or the value is not one.
    """
    options = find_optimizer(name).options
    return {key: _parse_option(name, options, key, text) for key, text in config.items()}


def _parse_option(name: str, options: Mapping[str, Option], key: str, text: str) -> OptionValue:
    option = options.get(key)
    if option is None:
        raise OptimizerOptionError(key, f"{name} has no setting {key!r}, only {_listed(options)}{_own_field(key)}")
    try:
        return option.parse(text)
    except (KeyError, ValueError):
        raise OptimizerOptionError(
            key, f"{text!r} is no value of {name}'s {key}; give {option.describe()} (default {_shown(option)})"
        ) from None


_OWN_FIELDS = {
    "lr": "learning_rate",
    "learning_rate": "learning_rate",
    "betas": "beta1 and beta2",
    "beta1": "beta1",
    "beta2": "beta2",
    "weight_decay": "weight_decay",
}


def _own_field(key: str) -> str:
    return f"; use the field {_OWN_FIELDS[key]}" if key in _OWN_FIELDS else ""


def _listed(options: Mapping[str, Option]) -> str:
    return ", ".join(sorted(options)) or "none"


def _shown(option: Option) -> str:
    return str(option.default).lower()


def _refusal(name: str) -> str:
    if name in REFUSED:
        why, nearest = REFUSED[name]
        return f"optimizer {name!r} is not offered: {why}; use {nearest}"
    if name.startswith("deepspeed-"):
        return f"optimizer {name[:100]!r} is not offered: a job runs without DeepSpeed; use adamw"
    close = difflib.get_close_matches(name, CATALOGUE, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"optimizer {name[:100]!r} is unknown; use one of {', '.join(CATALOGUE)}{hint}"
