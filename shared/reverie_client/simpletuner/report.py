"""What became of each key of a configuration: honoured, changed, ignored or refused, with the reason."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby
from typing import Any

SECRET = re.compile(r"auth_token|hf_token|webhook_url|\w*access_key\w*|\w*secret\w*|\w*password\w*|\w*api_key\w*")
"""Keys whose values are shown to nobody."""

MAX_SHOWN_CHARACTERS = 60


class Outcome(StrEnum):
    """What happened to one key."""

    HONOURED = "honoured"
    CHANGED = "changed"
    IGNORED = "ignored"
    REFUSED = "refused"
    ADDED = "added"
    """The file does not say it: SimpleTuner's own default is written down, because Reverie's is another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportLine:
    """What became of one key."""

    file: str
    key: str
    """As it is spelled in the file, with dots for what is inside."""
    outcome: Outcome
    value: str
    """What the file says, as text; secrets are hidden."""
    field: str = ""
    """Where it is in the job file."""
    result: str = ""
    """What it is there."""
    reason: str = ""


@dataclass(kw_only=True, slots=True)
class Report:
    """A line for each key."""

    lines: list[ReportLine] = field(default_factory=list)

    def of(self, outcome: Outcome) -> list[ReportLine]:
        """The lines with one outcome."""
        return [line for line in self.lines if line.outcome is outcome]

    @property
    def has_refusals(self) -> bool:
        """Whether something that was asked for does not work."""
        return bool(self.of(Outcome.REFUSED))

    def counts(self) -> dict[str, int]:
        """Lines by outcome."""
        found = Counter(line.outcome for line in self.lines)
        return {outcome.value: found[outcome] for outcome in Outcome}

    def as_json(self) -> list[dict[str, str]]:
        """The lines as plain values."""
        return [
            {
                "file": line.file,
                "key": line.key,
                "outcome": line.outcome.value,
                "value": line.value,
                "field": line.field,
                "result": line.result,
                "reason": line.reason,
            }
            for line in self.lines
        ]

    def files(self) -> list[str]:
        """The files that the lines are about, in their order."""
        return list(dict.fromkeys(line.file for line in self.lines))

    def rows(self, file: str) -> Iterator[tuple[str, str, str, str]]:
        """Rows of one file's table: key, value, outcome, what it means. Neighbours that say the same share one."""
        for _, group in groupby((line for line in self.lines if line.file == file), key=_group):
            lines = list(group)
            first = lines[0]
            keys = ", ".join(line.key for line in lines)
            value = first.value if len(lines) == 1 else ""
            where = f"{first.field} = {first.result}" if first.field and first.result else first.field or first.result
            meaning = "; ".join(part for part in (where, first.reason) if part)
            yield keys, value, first.outcome.value, meaning


def _group(line: ReportLine) -> tuple[str, ...]:
    alike = line.outcome is Outcome.IGNORED and not line.field
    return (line.outcome.value, line.reason, "" if alike else line.key)


def shown(value: Any, key: str = "") -> str:
    """Return a value as the report shows it."""
    if SECRET.fullmatch(key) and value not in (None, ""):
        return "(hidden)"
    if isinstance(value, bool):
        return str(value).lower()
    text = value if isinstance(value, str) else _plain(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[: MAX_SHOWN_CHARACTERS - 3]}..."


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(shown(each) for each in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(each, str(key))}" for key, each in value.items()) + "}"
    return "null" if value is None else str(value)
