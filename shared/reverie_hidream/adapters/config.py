"""LoKr configurations in LyCORIS' JSON form (spec 4.1, 4.2)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

CLASS_ALIASES: Mapping[str, str] = {
    # Names of other HiDream code, used in most LyCORIS configurations, and diffusers' classes (spec 4.2).
    "Attention": "HiDreamAttention",
    "FeedForward": "HiDreamImageFeedForwardSwiGLU",
    "MOEFeedForward": "MOEFeedForwardSwiGLU",
}

_INACTIVE: Mapping[str, tuple[Any, ...]] = {
    # LyCORIS settings that we do not offer, with the values that mean "off" or that change nothing for LoKr on Linears.
    "dropout": (0, 0.0, None),
    "rank_dropout": (0, 0.0, None),
    "module_dropout": (0, 0.0, None),
    "dora_wd": (False, None),
    "bypass_mode": (True, False, None),
    "unbalanced_factorization": (False, None),
    "use_tucker": (True, False, None),
    "train_norm": (False, None),
}


class AdapterConfigError(ValueError):
    """A LoKr configuration that cannot be used; the message names every offending field."""


class AdapterMatchesNothingError(ValueError):
    """A selection that matches no Linear of the model; the message names it and what there is to select."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LokrOverrides:
    """Fields of `LokrConfig` that differ for the modules of one selector; None keeps the configuration's value."""

    factor: int | None = None
    linear_dim: int | None = None
    linear_alpha: float | None = None
    full_matrix: bool | None = None
    use_scalar: bool | None = None
    decompose_both: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, as LyCORIS names them."""
        names = {"linear_dim": "dim", "linear_alpha": "alpha"}
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {names.get(name, name): value for name, value in values.items() if value is not None}


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

    def class_selection(self) -> tuple[str, ...]:
        """Selected classes as the caller named them; names alone select if there are any (spec 4.2, variant 3)."""
        return self.target_module or ()

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
        if self.use_fnmatch:
            preset["use_fnmatch"] = True
        return preset


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
    apply_preset: LokrPreset = field(default_factory=lambda: LokrPreset(target_module=("Attention",)))
    """Which Linears are adapted."""

    def __post_init__(self) -> None:
        """Refuse values without meaning, all at once."""
        problems = []
        if self.factor != -1 and self.factor < 1:
            problems.append(f"factor {self.factor} must be -1 or at least 1")
        if self.linear_dim < 1:
            problems.append(f"linear_dim {self.linear_dim} must be at least 1")
        for name in ("linear_alpha", "multiplier"):
            if not math.isfinite(getattr(self, name)):
                problems.append(f"{name} {getattr(self, name)} must be a finite number")
        if self.linear_alpha < 0:
            problems.append(f"linear_alpha {self.linear_alpha} must not be below 0")
        if problems:
            raise AdapterConfigError("LoKr configuration: " + "; ".join(problems))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LokrConfig:
        """Read LyCORIS' JSON form; what it leaves out is what LyCORIS takes: factor -1, linear_dim 4, not full_matrix.

        Without `apply_preset` the Attention classes are adapted, not every Linear as in LyCORIS.

        Raises:
            AdapterConfigError: unknown or unusable fields, all of them named.
        """
        return _Reader().config(config)

    def to_dict(self) -> dict[str, Any]:
        """LyCORIS' JSON form, complete: also multiplier, linear_dim and linear_alpha, which some files lack."""
        config: dict[str, Any] = {"algo": "lokr"}
        for item in fields(self):
            config[item.name] = getattr(self, item.name)
        config["linear_alpha"] = _whole_if_exact(self.linear_alpha)
        config["apply_preset"] = self.apply_preset.to_dict()
        return config

    def to_json(self) -> str:
        """`to_dict` as it is written into files: the same configuration always gives the same text."""
        return json.dumps(self.to_dict(), indent=2)


def _whole_if_exact(number: float) -> float | int:
    # Some readers take alpha for an int only.
    return int(number) if number == int(number) else number


class _Reader:
    """Reads a configuration and collects what is wrong with it."""

    def __init__(self) -> None:
        self._problems: list[str] = []

    def config(self, raw: Mapping[str, Any]) -> LokrConfig:
        values = dict(raw)
        if str(values.pop("algo", "lokr")).lower() != "lokr":
            self._problems.append(f"algo {raw['algo']!r} is not supported; use lokr")
        preset = values.pop("apply_preset", None)
        for name, allowed in _INACTIVE.items():
            if name in values and values[name] not in allowed:
                self._problems.append(f"{name} {values[name]!r} is not supported; leave it out")
            values.pop(name, None)
        settings = self._fields(LokrConfig, values, "")
        if preset is not None:
            settings["apply_preset"] = self._preset(preset)
        if self._problems:
            raise AdapterConfigError("LoKr configuration: " + "; ".join(self._problems))
        return LokrConfig(**{**_FORMAT_DEFAULTS, **settings})

    def _preset(self, raw: Any) -> LokrPreset:
        values = dict(self._mapping(raw, "apply_preset"))
        values.pop("enable_conv", None)
        values.pop("lora_prefix", None)
        settings: dict[str, Any] = {}
        for name in ("module_algo_map", "name_algo_map"):
            entries = self._mapping(values.pop(name, {}), f"apply_preset.{name}")
            settings[name] = {
                key: self._overrides(value, f"apply_preset.{name}.{key}") for key, value in entries.items()
            }
        for name in ("target_module", "target_name", "exclude_name"):
            if name in values:
                settings[name] = self._strings(values.pop(name), f"apply_preset.{name}")
        settings["use_fnmatch"] = self._value(bool, values.pop("use_fnmatch", False), "apply_preset.use_fnmatch")
        self._refuse_unknown(values, "apply_preset.", [item.name for item in fields(LokrPreset)])
        return LokrPreset(**settings)

    def _overrides(self, raw: Any, path: str) -> LokrOverrides:
        values = dict(self._mapping(raw, path))
        if str(values.pop("algo", "lokr")).lower() != "lokr":
            self._problems.append(f"{path}.algo is not supported; use lokr")
        for short, long in (("dim", "linear_dim"), ("alpha", "linear_alpha")):
            if short in values:
                values[long] = values.pop(short)
        return LokrOverrides(**self._fields(LokrOverrides, values, f"{path}."))

    def _fields(self, target: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        types = _FIELD_TYPES
        names = [item.name for item in fields(target) if item.name in types]
        self._refuse_unknown({key: 0 for key in values if key not in names}, prefix, names)
        return {name: self._value(types[name], values[name], prefix + name) for name in names if name in values}

    def _refuse_unknown(self, left: Mapping[str, Any], prefix: str, known: list[str]) -> None:
        for key in left:
            self._problems.append(f"{prefix}{key} is unknown; known are {', '.join(known)}")

    def _mapping(self, raw: Any, path: str) -> Mapping[str, Any]:
        if isinstance(raw, Mapping):
            return raw
        self._problems.append(f"{path} must be an object; got {raw!r}")
        return {}

    def _strings(self, raw: Any, path: str) -> tuple[str, ...]:
        if isinstance(raw, list | tuple) and all(isinstance(item, str) for item in raw):
            return tuple(raw)
        self._problems.append(f"{path} must be a list of strings; got {raw!r}")
        return ()

    def _value(self, kind: type, raw: Any, path: str) -> Any:
        if kind is float and isinstance(raw, int | float) and not isinstance(raw, bool):
            return float(raw)
        if kind is not float and isinstance(raw, kind) and not (kind is int and isinstance(raw, bool)):
            return raw
        self._problems.append(f"{path} must be a {_KIND_NAMES[kind]}; got {raw!r}")
        return kind()


_FORMAT_DEFAULTS: Mapping[str, Any] = {"factor": -1, "linear_dim": 4, "full_matrix": False}
_KIND_NAMES = {int: "whole number", float: "number", bool: "true or false"}
_FIELD_TYPES: Mapping[str, type] = {
    "factor": int,
    "linear_dim": int,
    "linear_alpha": float,
    "multiplier": float,
    "full_matrix": bool,
    "use_scalar": bool,
    "decompose_both": bool,
}
