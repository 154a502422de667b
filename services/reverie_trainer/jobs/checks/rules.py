"""What the checks of all parts of a job share: one rule for each kind of value, each yielding violations.

Every description has the value, the limit and the remedy.
"""

import difflib
import math
import re
from collections.abc import Iterator, Sequence

from reverie_common.errors import FieldViolation

MAX_PROMPT_CHARACTERS = 8192

JOB_NAME = re.compile(r"[a-z0-9-]{1,63}")
PROMPT_NAME = re.compile(r"[a-z0-9_-]{1,63}")


def name(path: str, value: str, pattern: re.Pattern[str], letters: str) -> Iterator[FieldViolation]:
    """Demand a name of letters that a pattern allows."""
    if not value:
        yield violation(path, f"it is missing; give 1 to 63 characters of {letters}")
    elif not pattern.fullmatch(value):
        yield violation(path, f"{value[:100]!r} does not match {letters}{{1,63}}; rename it")


def text(path: str, value: str) -> Iterator[FieldViolation]:
    """Demand a text of at most MAX_PROMPT_CHARACTERS."""
    if len(value) > MAX_PROMPT_CHARACTERS:
        yield violation(
            path, f"{len(value)} characters are above {MAX_PROMPT_CHARACTERS}; shorten it (encoders read 128 tokens)"
        )


def one_of(path: str, value: str, allowed: Sequence[str]) -> Iterator[FieldViolation]:
    """Demand one of several words; the refusal names the nearest."""
    if value in allowed:
        return
    close = difflib.get_close_matches(value, allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    names = ", ".join(allowed)
    yield violation(path, f"unknown value {value[:100]!r}, expected one of {names}{hint}")


def between(path: str, value: float, low: float, high: float, unit: str = "") -> Iterator[FieldViolation]:
    """Demand a number in a range."""
    if not low <= value <= high:
        suffix = f" {unit}" if unit else ""
        direction = "raise" if value < low else "lower"
        yield violation(path, f"{value:.9g} is outside {low:.9g} to {high:.9g}{suffix}; {direction} it")


def positive(path: str, value: float) -> Iterator[FieldViolation]:
    """Demand a finite number above 0."""
    yield from real(path, value, above=0.0)


def real(
    path: str, value: float, *, above: float = -math.inf, at_least: float = -math.inf, at_most: float = math.inf
) -> Iterator[FieldViolation]:
    """Demand a finite number within limits."""
    if math.isfinite(value) and above < value and at_least <= value <= at_most:
        return
    limits = []
    if above > -math.inf:
        limits.append(f"above {above:g}")
    if at_least > -math.inf:
        limits.append(f"at least {at_least:g}")
    if at_most < math.inf:
        limits.append(f"at most {at_most:g}")
    yield violation(path, f"{value!r} is not a finite number {' and '.join(limits)}")


def repeated(path: str, values: Sequence[str]) -> Iterator[FieldViolation]:
    """Refuse values that are given more than once."""
    for value in sorted({value for value in values if values.count(value) > 1}):
        yield violation(path, f"{value!r} is given {values.count(value)} times; pictures need distinct file names")


def violation(path: str, description: str) -> FieldViolation:
    """Return one violation."""
    return FieldViolation(field=path, description=description)
