"""What may be said of the adapter."""

import re
from collections.abc import Iterable, Iterator

from reverie_common.errors import FieldViolation

from reverie_trainer.jobs.checks.rules import between, positive, violation
from reverie_trainer.jobs.spec import Adapter, LokrAdapter, LokrOverrides


def check_adapter(adapter: Adapter | None) -> Iterator[FieldViolation]:
    """Yield what is wrong with the adapter."""
    if adapter is None:
        yield violation("adapter", "no adapter is given; set adapter.lokr, `{}` takes every default")
        return
    if not isinstance(adapter, LokrAdapter):
        return
    path = "adapter.lokr"
    yield from _factor(f"{path}.factor", adapter.factor)
    yield from between(f"{path}.linear_dim", adapter.linear_dim, 1, 1_000_000)
    yield from positive(f"{path}.linear_alpha", adapter.linear_alpha)
    yield from positive(f"{path}.multiplier", adapter.multiplier)
    preset = adapter.apply_preset
    for name, overrides in preset.module_algo_map.items():
        yield from _overrides(f"{path}.apply_preset.module_algo_map[{name!r}]", overrides)
    for name, overrides in preset.name_algo_map.items():
        yield from _overrides(f"{path}.apply_preset.name_algo_map[{name!r}]", overrides)
    if not preset.use_fnmatch:
        yield from _regular_expressions(f"{path}.apply_preset.name_algo_map", preset.name_algo_map)


def _overrides(path: str, overrides: LokrOverrides) -> Iterator[FieldViolation]:
    if overrides.factor is not None:
        yield from _factor(f"{path}.factor", overrides.factor)
    if overrides.linear_dim is not None:
        yield from between(f"{path}.linear_dim", overrides.linear_dim, 1, 1_000_000)
    if overrides.linear_alpha is not None:
        yield from positive(f"{path}.linear_alpha", overrides.linear_alpha)


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
