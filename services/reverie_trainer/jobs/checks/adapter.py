"""What may be said of the adapter."""

import re
from collections.abc import Iterable, Iterator

from reverie_common.errors import FieldViolation

from reverie_trainer.jobs.admission.adapter_counts import KNOWN_SETTINGS, OPTION_TYPES, option_value, settings_of
from reverie_trainer.jobs.checks.rules import between, one_of, positive, real, violation
from reverie_trainer.jobs.spec import (
    Adapter,
    FullRank,
    JobSpec,
    LokrAdapter,
    LokrOverrides,
    LokrPreset,
    LoraAdapter,
    LycorisAdapter,
)
from reverie_trainer.jobs.spec.adapter import KINDS

REFUSED_ALGORITHMS = {
    "tlora": (
        "its files can only be read back by repeating a singular value decomposition of the frozen weight, whose signs "
        "are not fixed; use locon"
    ),
    "norm": "it trains LayerNorm and GroupNorm, and HiDream's norms have no weights or are RMSNorm; use lokr",
}
LORA_INITS = ("default", "gaussian", "olora", "pissa")
LORA_FORMATS = ("diffusers", "comfyui")
MAX_LORA_RANK = 256
PLAIN = "no_change"

_PROBABILITIES = ("dropout", "rank_dropout", "module_dropout")
_OFF = {"use_scalar": False, "dora_wd": False}


def check_adapter(spec: JobSpec) -> Iterator[FieldViolation]:
    """Yield what is wrong with the adapter by itself, and with the precision that it is trained on."""
    adapter = spec.adapter
    if adapter is None:
        yield violation("adapter", "no adapter is given; set adapter.lokr, `{}` takes every default")
        return
    path = f"adapter.{_kind_name(adapter)}"
    if isinstance(adapter, LokrAdapter):
        yield from _lokr(path, adapter)
    elif isinstance(adapter, LycorisAdapter):
        yield from _lycoris(path, adapter)
    elif isinstance(adapter, LoraAdapter):
        yield from _lora(path, adapter, spec.model.base_precision)
    elif isinstance(adapter, FullRank) and spec.model.base_precision != PLAIN:
        yield violation(
            "model.base_precision",
            f"{spec.model.base_precision!r} cannot be trained at full rank; set base_precision to {PLAIN}",
        )


def _kind_name(adapter: Adapter) -> str:
    return next(name for name, kind in KINDS.items() if isinstance(adapter, kind))


def _lokr(path: str, adapter: LokrAdapter) -> Iterator[FieldViolation]:
    yield from _factor(f"{path}.factor", adapter.factor)
    yield from between(f"{path}.linear_dim", adapter.linear_dim, 1, 1_000_000)
    yield from _common(path, adapter)
    if adapter.init_lokr_norm is not None:
        yield from real(f"{path}.init_lokr_norm", adapter.init_lokr_norm, above=0.0, at_most=1.0)
    for where, overrides in _all_overrides(path, adapter.apply_preset):
        if overrides.algo not in (None, "lokr"):
            yield violation(
                f"{where}.algo", f"{overrides.algo!r} is another algorithm; use adapter.lycoris for a mixture"
            )


def _lycoris(path: str, adapter: LycorisAdapter) -> Iterator[FieldViolation]:
    algorithms = tuple(KNOWN_SETTINGS)
    yield from _algorithm(f"{path}.algo", adapter.algo, algorithms)
    yield from between(f"{path}.linear_dim", adapter.linear_dim, 1, 1_000_000)
    yield from _common(path, adapter)
    for where, overrides in _all_overrides(path, adapter.apply_preset):
        if overrides.algo is not None:
            yield from _algorithm(f"{where}.algo", overrides.algo, algorithms)
    chosen = {adapter.algo} | {own.algo for _, own in _all_overrides(path, adapter.apply_preset) if own.algo}
    if not chosen <= KNOWN_SETTINGS.keys():
        return
    bad_options = list(_options(path, adapter, chosen))
    yield from bad_options
    for name, off in _OFF.items():
        for algo in sorted(chosen):
            if getattr(adapter, name) != off and name not in KNOWN_SETTINGS[algo]:
                knowing = ", ".join(other for other, known in KNOWN_SETTINGS.items() if name in known)
                yield violation(f"{path}.{name}", f"{algo} has no {name}; leave it out, or use one of {knowing}")
    for where, overrides in _all_overrides(path, adapter.apply_preset):
        yield from _unknown_to_algorithm(where, overrides, overrides.algo or adapter.algo)
    if not bad_options and "dylora" in chosen:
        settings = settings_of(adapter, None)
        if settings.block_size < 1 or settings.linear_dim % settings.block_size:
            yield violation(
                f"{path}.linear_dim",
                f"{settings.linear_dim} is no multiple of options.block_size {settings.block_size}; choose another of "
                "the two",
            )


def _unknown_to_algorithm(path: str, overrides: LokrOverrides, algo: str) -> Iterator[FieldViolation]:
    for name in ("factor", "full_matrix", "use_scalar", "decompose_both"):
        if getattr(overrides, name) is not None and name not in KNOWN_SETTINGS[algo]:
            knowing = ", ".join(other for other, known in KNOWN_SETTINGS.items() if name in known)
            yield violation(f"{path}.{name}", f"{algo} has no {name}; leave it out, or use one of {knowing}")


def _lora(path: str, adapter: LoraAdapter, base_precision: str) -> Iterator[FieldViolation]:
    yield from between(f"{path}.rank", adapter.rank, 1, MAX_LORA_RANK)
    if adapter.alpha is not None:
        yield from positive(f"{path}.alpha", adapter.alpha)
    yield from _probability(f"{path}.dropout", adapter.dropout)
    yield from one_of(f"{path}.init_type", adapter.init_type, LORA_INITS)
    yield from one_of(f"{path}.format", adapter.format, LORA_FORMATS)
    if not all(adapter.target_modules):
        yield violation(f"{path}.target_modules", "an empty name would match every module; remove it")
    if adapter.use_dora and base_precision != PLAIN:
        yield violation(
            f"{path}.use_dora",
            f"true needs exact weights, base_precision is {base_precision!r}; set that to {PLAIN}, or this to false",
        )
    if adapter.use_dora and adapter.init_type in ("olora", "pissa"):
        yield violation(f"{path}.init_type", f"{adapter.init_type!r} excludes use_dora; use default")


def _options(path: str, adapter: LycorisAdapter, chosen: set[str]) -> Iterator[FieldViolation]:
    known = {name for algo in chosen for name in KNOWN_SETTINGS[algo]} & OPTION_TYPES.keys()
    for name, text in adapter.options.items():
        where = f"{path}.options[{name!r}]"
        if name not in known:
            has = f"it knows {', '.join(sorted(known))}" if known else "it knows none"
            yield violation(where, f"{', '.join(sorted(chosen))} has no option {name[:40]!r}; {has}")
            continue
        try:
            value = option_value(name, text)
        except ValueError as error:
            yield violation(where, f"{error}; write it as text, for instance {_example(name)}")
            continue
        if name == "factor":
            yield from _factor(where, int(value))
        elif name == "constraint":
            yield from real(where, float(value), at_least=0.0)
        elif name == "block_size":
            yield from between(where, value, 1, 1_000_000)


def _example(name: str) -> str:
    return {bool: "'true'", int: "'4'", float: "'0.5'"}[OPTION_TYPES[name]]


def _common(path: str, adapter: LokrAdapter | LycorisAdapter) -> Iterator[FieldViolation]:
    yield from positive(f"{path}.linear_alpha", adapter.linear_alpha)
    yield from positive(f"{path}.multiplier", adapter.multiplier)
    for name in _PROBABILITIES:
        yield from _probability(f"{path}.{name}", getattr(adapter, name))
    preset = adapter.apply_preset
    for where, overrides in _all_overrides(path, preset):
        yield from _overrides(where, overrides)
    if not preset.use_fnmatch:
        for name in ("name_algo_map", "target_name", "exclude_name"):
            yield from _regular_expressions(f"{path}.apply_preset.{name}", getattr(preset, name))


def _all_overrides(path: str, preset: LokrPreset) -> Iterator[tuple[str, LokrOverrides]]:
    for name in ("module_algo_map", "name_algo_map"):
        for key, overrides in getattr(preset, name).items():
            yield f"{path}.apply_preset.{name}[{key!r}]", overrides


def _overrides(path: str, overrides: LokrOverrides) -> Iterator[FieldViolation]:
    if overrides.factor is not None:
        yield from _factor(f"{path}.factor", overrides.factor)
    if overrides.linear_dim is not None:
        yield from between(f"{path}.linear_dim", overrides.linear_dim, 1, 1_000_000)
    if overrides.linear_alpha is not None:
        yield from positive(f"{path}.linear_alpha", overrides.linear_alpha)
    for name in _PROBABILITIES:
        if getattr(overrides, name) is not None:
            yield from _probability(f"{path}.{name}", getattr(overrides, name))


def _algorithm(path: str, algo: str, algorithms: tuple[str, ...]) -> Iterator[FieldViolation]:
    if algo in REFUSED_ALGORITHMS:
        yield violation(path, f"{algo!r} is not supported: {REFUSED_ALGORITHMS[algo]}")
    else:
        yield from one_of(path, algo, algorithms)


def _probability(path: str, value: float) -> Iterator[FieldViolation]:
    if not 0 <= value < 1:
        yield violation(path, f"{value!r} is outside 0 to below 1; lower it")


def _regular_expressions(path: str, patterns: Iterable[str]) -> Iterator[FieldViolation]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield violation(
                f"{path}[{pattern!r}]",
                f"{pattern!r} is no regular expression ({error}); correct it or set use_fnmatch",
            )


def _factor(path: str, factor: int) -> Iterator[FieldViolation]:
    if factor != -1 and not 1 <= factor <= 65536:
        yield violation(path, f"{factor} is neither -1 nor within 1 to 65536; -1 is the most balanced split")
