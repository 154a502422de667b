"""Reading LyCORIS' JSON form into configurations (spec 4.1): every problem is named, nothing is ignored in silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from reverie_hidream.adapters.config import (
    AdapterConfigError,
    LokrConfig,
    LokrOverrides,
    LokrPreset,
    LycorisConfig,
)

_INACTIVE: Mapping[str, tuple[Any, ...]] = {
    # LyCORIS settings that we do not offer, with the values that mean "off" or that change nothing on a Linear.
    "unbalanced_factorization": (False, None),
    "use_tucker": (True, False, None),
    "train_norm": (False, None),
    # Its files with norms over columns are loaded by no reader, LyCORIS' own included.
    "wd_on_output": (True, None),
    "conv_dim": (0, None),
    "conv_alpha": (0, None),
}
_WITHOUT_NONE = ("dropout", "rank_dropout", "module_dropout", "dora_wd")
_LOKR_DEFAULTS: Mapping[str, Any] = {"factor": -1, "linear_dim": 4, "full_matrix": False}
_LYCORIS_DEFAULTS: Mapping[str, Any] = {"algo": "locon", "linear_dim": 4}
_KIND_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "word"}
_FIELD_TYPES: Mapping[str, type] = {
    "algo": str,
    "factor": int,
    "linear_dim": int,
    "linear_alpha": float,
    "multiplier": float,
    "full_matrix": bool,
    "use_scalar": bool,
    "decompose_both": bool,
    "dropout": float,
    "rank_dropout": float,
    "module_dropout": float,
    "dora_wd": bool,
    "init_lokr_norm": float,
    "bypass_mode": bool,
    "block_size": int,
    "constraint": float,
    "rescaled": bool,
    "train_on_input": bool,
}


def read_lokr(config: Mapping[str, Any]) -> LokrConfig:
    """See `LokrConfig.from_dict`."""
    reader = _Reader("LoKr")
    values = dict(config)
    reader.refuse_other_algorithm(values.pop("algo", "lokr"), "algo")
    settings = reader.settings(LokrConfig, values)
    reader.finish()
    return LokrConfig(**{**_LOKR_DEFAULTS, **settings})


def read_lycoris(config: Mapping[str, Any]) -> LycorisConfig:
    """See `LycorisConfig.from_dict`."""
    reader = _Reader("LyCORIS")
    values = {name: value for name, value in config.items() if name != "bypass_mode"}
    settings = reader.settings(LycorisConfig, values)
    reader.finish()
    return LycorisConfig(**{**_LYCORIS_DEFAULTS, **settings})


class _Reader:
    """Reads a configuration and collects what is wrong with it."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._problems: list[str] = []

    def settings(self, target: type, values: dict[str, Any]) -> dict[str, Any]:
        preset = values.pop("apply_preset", None)
        for name, allowed in _INACTIVE.items():
            if name in values and values[name] not in allowed:
                self._problems.append(f"{name} {values[name]!r} is not supported; leave it out")
            values.pop(name, None)
        for name in _WITHOUT_NONE:
            if name in values and values[name] is None:
                del values[name]
        settings = self._fields(target, values, "")
        if preset is not None:
            settings["apply_preset"] = self._preset(preset)
        return settings

    def refuse_other_algorithm(self, algo: Any, path: str) -> None:
        if str(algo).lower() != "lokr":
            self._problems.append(f"{path} {algo!r} is not supported; use lokr")

    def finish(self) -> None:
        if self._problems:
            raise AdapterConfigError(f"{self._kind} configuration: " + "; ".join(self._problems))

    def _preset(self, raw: Any) -> LokrPreset:
        values = dict(self._mapping(raw, "apply_preset"))
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
        for name in ("use_fnmatch", "enable_conv"):
            settings[name] = self._value(bool, values.pop(name, False), f"apply_preset.{name}")
        self._refuse_unknown(values, "apply_preset.", [item.name for item in fields(LokrPreset)])
        return LokrPreset(**settings)

    def _overrides(self, raw: Any, path: str) -> LokrOverrides:
        values = dict(self._mapping(raw, path))
        if self._kind == "LoKr":
            self.refuse_other_algorithm(values.pop("algo", "lokr"), f"{path}.algo")
        for short, long in (("dim", "linear_dim"), ("alpha", "linear_alpha")):
            if short in values:
                values[long] = values.pop(short)
        return LokrOverrides(**self._fields(LokrOverrides, values, f"{path}."))

    def _fields(self, target: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        names = [item.name for item in fields(target) if item.name in _FIELD_TYPES]
        self._refuse_unknown({key: 0 for key in values if key not in names}, prefix, names)
        return {name: self._value(_FIELD_TYPES[name], values[name], prefix + name) for name in names if name in values}

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
        if raw is None and path in ("init_lokr_norm", "bypass_mode"):
            return None
        if kind is float and isinstance(raw, int | float) and not isinstance(raw, bool):
            return float(raw)
        if kind is not float and isinstance(raw, kind) and not (kind is int and isinstance(raw, bool)):
            return raw
        self._problems.append(f"{path} must be a {_KIND_NAMES[kind]}; got {raw!r}")
        return kind()
