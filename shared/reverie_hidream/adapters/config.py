"""Configurations of adapters: LoKr and the other algorithms of LyCORIS, LoRA, and every weight (spec 4.1, 4.2, 4.8).

LyCORIS' JSON form is read in `reading`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

PROBABILITIES = ("dropout", "rank_dropout", "module_dropout")

LORA_INITS = ("default", "gaussian", "olora", "pissa")
LORA_FORMATS = ("diffusers", "comfyui")


class AdapterConfigError(ValueError):
    """An adapter's configuration that cannot be used; the message names every offending field."""


class AdapterMatchesNothingError(ValueError):
    """A selection that matches no Linear of the model; the message names it and what there is to select."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LokrOverrides:
    """Fields of a configuration that differ for the modules of one selector; None keeps the configuration's value."""

    factor: int | None = None
    linear_dim: int | None = None
    linear_alpha: float | None = None
    full_matrix: bool | None = None
    use_scalar: bool | None = None
    decompose_both: bool | None = None
    dropout: float | None = None
    rank_dropout: float | None = None
    module_dropout: float | None = None
    algo: str | None = None
    """Another algorithm for these modules; only in a `LycorisConfig`."""

    def given(self) -> dict[str, Any]:
        """The fields that are set."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, as LyCORIS names them."""
        names = {"linear_dim": "dim", "linear_alpha": "alpha"}
        return {names.get(name, name): value for name, value in self.given().items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class LokrPreset:
    """Which Linears are adapted."""

    target_module: tuple[str, ...] | None = None
    """Classes, or their aliases, whose Linears are all adapted; None where only names select."""
    module_algo_map: Mapping[str, LokrOverrides] = field(default_factory=dict)
    """Overrides by class; as in LyCORIS, naming a class here also selects it."""
    name_algo_map: Mapping[str, LokrOverrides] = field(default_factory=dict)
    """Overrides by pattern of the dotted module name; they also select."""
    target_name: tuple[str, ...] = ()
    """Patterns that select without overrides."""
    exclude_name: tuple[str, ...] = ()
    """Patterns of modules that are left out."""
    use_fnmatch: bool = False
    """Patterns are those of fnmatch; otherwise regular expressions, matched from the start of the name."""
    enable_conv: bool = False
    """Adapt convolutions too; HiDream's transformer has none, so it changes nothing."""

    def class_selection(self) -> tuple[str, ...]:
        """Selected classes as the caller named them; names alone select if there are any (spec 4.2, variant 3)."""
        return self.target_module or ()

    def overrides(self) -> Iterator[tuple[str, LokrOverrides]]:
        """Every override with its path."""
        for name in ("module_algo_map", "name_algo_map"):
            for key, value in getattr(self, name).items():
                yield f"apply_preset.{name}.{key}", value

    def to_dict(self) -> dict[str, Any]:
        """LyCORIS' JSON form, with the caller's class names."""
        preset: dict[str, Any] = {}
        if self.target_module is not None:
            preset["target_module"] = list(self.target_module)
        for name in ("module_algo_map", "name_algo_map"):
            if overrides := getattr(self, name):
                preset[name] = {key: value.to_dict() for key, value in overrides.items()}
        for name in ("target_name", "exclude_name"):
            if patterns := getattr(self, name):
                preset[name] = list(patterns)
        for name in ("use_fnmatch", "enable_conv"):
            if getattr(self, name):
                preset[name] = True
        return preset


def _attention() -> LokrPreset:
    return LokrPreset(target_module=("Attention",))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleSettings:
    """What shapes and trains the adapter of one Linear: a configuration with its overrides applied."""

    algo: str
    factor: int = -1
    linear_dim: int = 4
    linear_alpha: float = 1.0
    multiplier: float = 1.0
    full_matrix: bool = False
    use_scalar: bool = False
    decompose_both: bool = False
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    dora_wd: bool = False
    block_size: int = 4
    """DyLoRA: rows that are trained together."""
    constraint: float = 0.0
    """OFT and BOFT: how far a rotation may go, relative to the layer's width; 0 is no limit."""
    rescaled: bool = False
    """OFT and BOFT: train a scale for each output too."""
    train_on_input: bool = False
    """IA3: scale inputs and not outputs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LokrConfig:
    """A LoKr: the change of each selected weight is scale * multiplier * kron(W1, W2) (spec 4.1, 4.4)."""

    factor: int = 16
    """Size of W1's sides where it divides the layer's; -1 is the most balanced split."""
    linear_dim: int = 16384
    """Rank of W2 where it is factorised: below half of W2's larger side."""
    linear_alpha: float = 1.0
    """Scale is linear_alpha / linear_dim where a part is factorised, 1 where both are full; 0 means linear_dim."""
    multiplier: float = 1.0
    """Strength of the adapter."""
    full_matrix: bool = True
    """Never factorise."""
    use_scalar: bool = False
    """One more trainable number for each module, from 0."""
    decompose_both: bool = False
    """Allow W1 to be factorised too."""
    dropout: float = 0.0
    """Probability that an element of the change of a layer's output is set to 0; the others grow to make up for it."""
    rank_dropout: float = 0.0
    """Probability that a row of the change of a weight is set to 0."""
    module_dropout: float = 0.0
    """Probability that a module's change is left out of a micro-batch."""
    dora_wd: bool = False
    """Train the length of the changed weight's rows apart from their direction (DoRA)."""
    init_lokr_norm: float | None = None
    """Start W1 at 1 and W2 as noise with the statistics of the frozen weight times this number; None is off."""
    bypass_mode: bool | None = field(default=None, compare=False)
    """As in the caller's file; the computation is always that of bypass mode, which is equal (spec 4.5)."""
    apply_preset: LokrPreset = field(default_factory=_attention)
    """Which Linears are adapted."""

    def __post_init__(self) -> None:
        """Refuse values without meaning, all at once."""
        problems = [*_number_problems(self), *_override_problems(self.apply_preset, algorithms=False)]
        if self.factor != -1 and self.factor < 1:
            problems.append(f"factor {self.factor} must be -1 or at least 1")
        if self.init_lokr_norm is not None and not (math.isfinite(self.init_lokr_norm) and self.init_lokr_norm > 0):
            problems.append(
                f"init_lokr_norm {self.init_lokr_norm} must be a finite number above 0; 1e-4 to 1e-3 is usual"
            )
        _refuse("LoKr", problems)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LokrConfig:
        """Read LyCORIS' JSON form; what it leaves out is what LyCORIS takes: factor -1, linear_dim 4, not full_matrix.

        Without `apply_preset` the Attention classes are adapted, not every Linear as in LyCORIS.

        Raises:
            AdapterConfigError: unknown or unusable fields, all of them named.
        """
        from reverie_hidream.adapters.reading import read_lokr  # it needs the classes above

        return read_lokr(config)

    def to_dict(self) -> dict[str, Any]:
        """LyCORIS' JSON form, complete: also multiplier, linear_dim and linear_alpha, which some files lack."""
        config: dict[str, Any] = {"algo": "lokr"}
        for item in fields(self):
            value = getattr(self, item.name)
            # What is off is left out, so that a file says what its maker said.
            if value != item.default or item.name in _ALWAYS_WRITTEN:
                config[item.name] = value
        config["linear_alpha"] = _whole_if_exact(self.linear_alpha)
        config["apply_preset"] = self.apply_preset.to_dict()
        return config

    def to_json(self) -> str:
        """`to_dict` as it is written into files: the same configuration always gives the same text."""
        return json.dumps(self.to_dict(), indent=2)

    def settings(self, overrides: LokrOverrides | None) -> ModuleSettings:
        """What holds for a module with these overrides."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _NOT_OF_A_MODULE}
        return replace(ModuleSettings(algo="lokr", **own), **({} if overrides is None else overrides.given()))


@dataclass(frozen=True, kw_only=True, slots=True)
class LycorisConfig:
    """Another algorithm of LyCORIS, or several, chosen by the overrides of a preset."""

    algo: str
    """One of `algorithms.ALGORITHMS`."""
    linear_dim: int = 16
    """Rank; block size of OFT and BOFT."""
    linear_alpha: float = 1.0
    """Scale is linear_alpha / linear_dim; 0 means linear_dim."""
    multiplier: float = 1.0
    """Strength of the adapter."""
    use_scalar: bool = False
    """One more trainable number for each module, from 0."""
    dropout: float = 0.0
    """See LokrConfig."""
    rank_dropout: float = 0.0
    """Probability that a rank (of a low-rank algorithm) or a row of the change is left out."""
    module_dropout: float = 0.0
    """See LokrConfig."""
    dora_wd: bool = False
    """See LokrConfig."""
    factor: int = -1
    """LoKr only, see LokrConfig."""
    full_matrix: bool = False
    """LoKr only."""
    decompose_both: bool = False
    """LoKr only."""
    block_size: int = 4
    """DyLoRA only: rows that are trained together."""
    constraint: float = 0.0
    """OFT and BOFT only: how far a rotation may go, relative to the layer's width; 0 is no limit."""
    rescaled: bool = False
    """OFT and BOFT only: train a scale for each output too."""
    train_on_input: bool = False
    """IA3 only: scale inputs and not outputs."""
    apply_preset: LokrPreset = field(default_factory=_attention)
    """Which Linears are adapted."""

    def __post_init__(self) -> None:
        """Refuse values without meaning, all at once; whether an algorithm knows them is checked where it is built."""
        problems = [*_number_problems(self), *_override_problems(self.apply_preset, algorithms=True)]
        if self.block_size < 1:
            problems.append(f"block_size {self.block_size} must be at least 1")
        if not (math.isfinite(self.constraint) and self.constraint >= 0):
            problems.append(f"constraint {self.constraint} must be a finite number of at least 0")
        _refuse("LyCORIS", problems)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LycorisConfig:
        """Read LyCORIS' JSON form; `algo` and `linear_dim` that it leaves out are LyCORIS' own: locon, 4.

        Raises:
            AdapterConfigError: unknown or unusable fields, all of them named.
        """
        from reverie_hidream.adapters.reading import read_lycoris  # it needs the classes above

        return read_lycoris(config)

    def to_dict(self) -> dict[str, Any]:
        """LyCORIS' JSON form: what differs from this class's defaults, and what every reader asks for."""
        config: dict[str, Any] = {"algo": self.algo}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in _ALWAYS_WRITTEN_BY_ANY or value != item.default:
                config[item.name] = value
        config["linear_alpha"] = _whole_if_exact(self.linear_alpha)
        config["apply_preset"] = self.apply_preset.to_dict()
        return config

    def to_json(self) -> str:
        """`to_dict` as it is written into files: the same configuration always gives the same text."""
        return json.dumps(self.to_dict(), indent=2)

    def settings(self, overrides: LokrOverrides | None) -> ModuleSettings:
        """What holds for a module with these overrides."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "apply_preset"}
        return replace(ModuleSettings(**own), **({} if overrides is None else overrides.given()))


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """LoRA: the change of each selected weight is alpha / rank * B A (spec 4.8)."""

    rank: int = 16
    """1 to 256."""
    alpha: float | None = None
    """Scale is alpha / rank; None means rank, so a scale of 1."""
    dropout: float = 0.0
    """Probability that an input of the adapter is set to 0; the others grow to make up for it."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out")
    """Names, or ends of dotted names, of the Linears to adapt."""
    init_type: str = "default"
    """`default` (A uniform, B zero), `gaussian` (A normal), `olora` or `pissa` (both from the weight)."""
    use_dora: bool = False
    """Train the length of the changed weight's rows apart from their direction (DoRA). Plain weights only."""
    format: str = "diffusers"
    """Keys of the file: `diffusers`, or `comfyui`: the same with `.alpha` tensors."""

    def __post_init__(self) -> None:
        """Refuse values without meaning, all at once."""
        problems = []
        if not 1 <= self.rank <= 256:
            problems.append(f"rank {self.rank} is outside 1 to 256")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            problems.append(f"alpha {self.alpha} must be a finite number above 0")
        problems += _probability_problems("dropout", self.dropout)
        if not self.target_modules or not all(self.target_modules):
            problems.append("target_modules names no module; the usual four are to_q, to_k, to_v, to_out")
        for name, allowed in (("init_type", LORA_INITS), ("format", LORA_FORMATS)):
            if getattr(self, name) not in allowed:
                problems.append(f"{name} {getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}")
        if self.use_dora and self.init_type in ("olora", "pissa"):
            problems.append(f"use_dora and init_type {self.init_type} exclude each other; use init_type default")
        _refuse("LoRA", problems)

    @property
    def scale(self) -> float:
        """What the product B A is multiplied with."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True, kw_only=True, slots=True)
class FullRankConfig:
    """Every weight of the transformer is trained; needs plain weights."""


AdapterConfig: TypeAlias = LokrConfig | LycorisConfig | LoraConfig | FullRankConfig

_ALWAYS_WRITTEN = (
    "factor",
    "linear_dim",
    "linear_alpha",
    "multiplier",
    "full_matrix",
    "use_scalar",
    "decompose_both",
)
_ALWAYS_WRITTEN_BY_ANY = ("linear_dim", "linear_alpha", "multiplier")
_NOT_OF_A_MODULE = ("apply_preset", "init_lokr_norm", "bypass_mode")


def _number_problems(config: LokrConfig | LycorisConfig) -> Iterator[str]:
    if config.linear_dim < 1:
        yield f"linear_dim {config.linear_dim} must be at least 1"
    for name in ("linear_alpha", "multiplier"):
        if not math.isfinite(getattr(config, name)):
            yield f"{name} {getattr(config, name)} must be a finite number"
    if config.linear_alpha < 0:
        yield f"linear_alpha {config.linear_alpha} must not be below 0"
    for name in PROBABILITIES:
        yield from _probability_problems(name, getattr(config, name))


def _override_problems(preset: LokrPreset, *, algorithms: bool) -> Iterator[str]:
    for path, overrides in preset.overrides():
        for name in PROBABILITIES:
            if getattr(overrides, name) is not None:
                yield from _probability_problems(f"{path}.{name}", getattr(overrides, name))
        if overrides.algo not in (None, "lokr") and not algorithms:
            yield f"{path}.algo {overrides.algo!r} is not supported here; use lokr, or adapter.lycoris for a mixture"


def _probability_problems(path: str, value: float) -> Iterator[str]:
    if not (math.isfinite(value) and 0 <= value < 1):
        yield f"{path} {value} is outside 0 to below 1"


def _refuse(kind: str, problems: list[str]) -> None:
    if problems:
        raise AdapterConfigError(f"{kind} configuration: " + "; ".join(problems))


def _whole_if_exact(number: float) -> float | int:
    # Some readers take alpha for an int only.
    return int(number) if number == int(number) else number
