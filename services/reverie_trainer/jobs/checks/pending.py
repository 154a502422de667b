"""Fields of the contract that do nothing yet are refused, not ignored."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from reverie_common.errors import FieldViolation

from reverie_trainer.jobs.checks.rules import violation
from reverie_trainer.jobs.spec import JobSpec

PENDING: frozenset[str] = frozenset()
"""Paths without indices; `adapter` stands for whatever kind it is."""


def check_pending(spec: JobSpec) -> Iterator[FieldViolation]:
    """Yield one violation for each field that is given and has no effect yet."""
    for path in sorted(set(_given(spec, ""))):
        if path in PENDING:
            yield violation(path, "this version does not do it yet; leave it out")


def _given(record: Any, path: str) -> Iterator[str]:
    """Paths of all fields that are not at their default."""
    default = type(record)()
    for item in fields(record):
        value = getattr(record, item.name)
        here = f"{path}.{item.name}" if path else item.name
        if value != getattr(default, item.name):
            yield here
        for child in value if isinstance(value, tuple) else (value,):
            if is_dataclass(child):
                yield from _given(child, here)
