"""How one option becomes one field: the few kinds of rules that the key tables are made of.

A rule looks at one given value, writes into the draft of the job, and records exactly one line of the report.
"""

import difflib
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from reverie_client.simpletuner.report import Outcome, Report, ReportLine, shown
from reverie_client.specs import BOOLEANS

UNSET: Any = object()
"""No default of SimpleTuner's has to be written down: Reverie's is the same, or there is none."""

SIMPLETUNER_DEFAULT = "SimpleTuner's default"

OFF: Sequence[Any] = (None, False, 0, "", "none", "no", "false", "0", "disabled", [], {})
"""What switches an option off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """One key with its value."""

    name: str
    """Without dashes, aliases resolved."""
    key: str
    """As it is spelled."""
    value: Any
    is_default: bool = False
    """The file does not have it; the value is SimpleTuner's default."""


@dataclass(kw_only=True, slots=True)
class Draft:
    """A job file in the making."""

    document: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    """Where a value comes from, by its path."""
    report: Report = field(default_factory=Report)
    draw_seed: Callable[[], int] = lambda: secrets.randbelow(2**32)

    def put(self, path: str, value: Any, comment: str = "") -> None:
        """Write a value at a dotted path."""
        *parents, last = path.split(".")
        place = self.document
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
        if comment:
            self.comments[path] = comment

    def get(self, path: str) -> Any:
        """Return what was written at a path, None where nothing was."""
        place: Any = self.document
        for part in path.split("."):
            place = place.get(part) if isinstance(place, dict) else None
        return place


@dataclass(kw_only=True, slots=True)
class Scope:
    """The options of one object of one file, and where they go."""

    file: str
    draft: Draft
    given: Mapping[str, Given]
    root: str = ""
    """Put before every field, with its dot."""
    prefix: str = ""
    """Put before every key in the report, with its dot."""
    fields: dict[str, Any] | None = None
    """Where values go instead of the draft: one entry of a list."""

    def value(self, name: str, default: Any = None) -> Any:
        """Return what an option says, as it stands."""
        found = self.given.get(name)
        return default if found is None or found.value is None else found.value

    def is_on(self, name: str, *, default: bool = False) -> bool:
        """Whether a switch is on; what is neither true nor false is off."""
        return parse_flag(self.value(name, default)) is True

    def honour(self, given: Given, path: str, value: Any, reason: str = "") -> None:
        """Take a value as it is meant."""
        self._write(given, Outcome.HONOURED, path, value, reason)

    def change(self, given: Given, path: str, value: Any, reason: str) -> None:
        """Take a value with another meaning; the reason says which."""
        self._write(given, Outcome.CHANGED, path, value, reason)

    def ignore(self, given: Given, reason: str) -> None:
        """Leave a key out that changes nothing here."""
        if not given.is_default:
            self._record(given, Outcome.IGNORED, "", "", reason)

    def refuse(self, given: Given, reason: str, nearest: str = "") -> None:
        """Say that what was asked for does not work, and what does."""
        remedy = f"; {nearest}" if nearest else ""
        self._record(given, Outcome.REFUSED, "", "", f"{reason}{remedy}")

    def _write(self, given: Given, outcome: Outcome, path: str, value: Any, reason: str) -> None:
        full = f"{self.root}{path}" if path else ""
        comment = f"not in {self.file}: {reason or SIMPLETUNER_DEFAULT}" if given.is_default else ""
        if value is not UNSET and full:
            if self.fields is None:
                self.draft.put(full, value, comment)
            else:
                self.fields[path] = value
        if given.is_default:
            outcome, reason = Outcome.ADDED, reason or SIMPLETUNER_DEFAULT
        self._record(given, outcome, full, "" if value is UNSET else shown(value), reason)

    def _record(self, given: Given, outcome: Outcome, path: str, result: str, reason: str) -> None:
        self.draft.report.lines.append(
            ReportLine(
                file=self.file,
                key=f"{self.prefix}{given.key}",
                outcome=outcome,
                value="" if given.is_default else shown(given.value, given.name),
                field=path,
                result=result,
                reason=reason,
            )
        )


Apply: TypeAlias = Callable[[Scope, Given], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One option of SimpleTuner's: what happens to it, for the docs and for the import."""

    name: str
    apply: Apply
    outcome: str
    """What mostly happens: `honoured`, `changed`, `ignored` or `refused`."""
    field: str = ""
    """Where it goes."""
    note: str = ""
    values: str = ""
    """What is taken, for the docs."""
    aliases: tuple[str, ...] = ()
    default: Any = UNSET
    """SimpleTuner's default where Reverie's is another."""
    is_default_needed: Callable[[Scope], bool] | None = None
    """When the default has to be written; None is always."""


def custom(
    name: str,
    apply: Apply,
    outcome: str,
    target: str = "",
    note: str = "",
    *,
    aliases: tuple[str, ...] = (),
    default: Any = UNSET,
) -> Option:
    """An option with a rule of its own."""
    return Option(name=name, apply=apply, outcome=outcome, field=target, note=note, aliases=aliases, default=default)


def flag(name: str, path: str, note: str = "", *, default: Any = UNSET, opposite: bool = False) -> Option:
    """A switch; with `opposite` the field says the contrary."""

    def apply(scope: Scope, given: Given) -> None:
        value = parse_flag(given.value)
        if value is None:
            scope.refuse(given, "it is neither true nor false")
            return
        scope.honour(given, path, value is not opposite, _flag_reason(given, value, note))

    return Option(name=name, apply=apply, outcome="honoured", field=path, note=note, default=default)


def _flag_reason(given: Given, value: bool, note: str) -> str:
    trap = "" if value or not isinstance(given.value, str) else "the text is read as false; SimpleTuner drops it"
    return "; ".join(part for part in (trap, note) if part)


def number(
    name: str,
    path: str,
    note: str = "",
    *,
    low: float = -math.inf,
    high: float = math.inf,
    is_whole: bool = False,
    aliases: tuple[str, ...] = (),
    default: Any = UNSET,
    outcome: str = "honoured",
) -> Option:
    """A number within limits."""

    def apply(scope: Scope, given: Given) -> None:
        value = parse_number(given.value, is_whole=is_whole)
        if value is None:
            scope.refuse(given, f"it is not a {'whole ' if is_whole else ''}number")
        elif not low <= value <= high:
            nearest = low if value < low else high
            scope.refuse(given, f"it is outside {low:g} to {high:g}", f"the nearest that works is {nearest:g}")
        elif outcome == "changed":
            scope.change(given, path, value, note)
        else:
            scope.honour(given, path, value, note)

    return Option(
        name=name,
        apply=apply,
        outcome=outcome,
        field=path,
        note=note,
        values=_range(low, high),
        aliases=aliases,
        default=default,
    )


def _range(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return ""
    return f"from {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"


def words(names: Iterable[str], without: Mapping[str, str] | None = None) -> str:
    """Return names as the docs list them, and which are refused."""
    taken = ", ".join(f"`{name}`" for name in names)
    left_out = ", ".join(f"`{name}`" for name in without or ())
    return f"{taken}; refused: {left_out}" if left_out else taken


def text(name: str, path: str, note: str = "", *, default: Any = UNSET) -> Option:
    """A text."""

    def apply(scope: Scope, given: Given) -> None:
        if isinstance(given.value, str):
            scope.honour(given, path, given.value, note)
        else:
            scope.refuse(given, "it is not text", "put it in quotes")

    return Option(name=name, apply=apply, outcome="honoured", field=path, note=note, default=default)


def choice(
    name: str,
    path: str,
    allowed: Mapping[str, str] | Sequence[str],
    note: str = "",
    *,
    refused: Mapping[str, str] | None = None,
    default: Any = UNSET,
) -> Option:
    """One of several words, by what they are called here; `refused` says of others why not and what works."""
    known = dict(allowed) if isinstance(allowed, Mapping) else {word: word for word in allowed}

    def apply(scope: Scope, given: Given) -> None:
        word = str(given.value).strip()
        if word in known:
            scope.honour(given, path, known[word], note)
        elif refused is not None and word in refused:
            scope.refuse(given, refused[word])
        else:
            near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.3)
            nearest = f"the nearest is {near[0]}" if near else f"use one of {', '.join(known)}"
            scope.refuse(given, f"there is no {word!r}", nearest)

    return Option(
        name=name,
        apply=apply,
        outcome="honoured",
        field=path,
        note=note,
        values=words(known, refused),
        default=default,
    )


def ignored(name: str, reason: str, *, aliases: tuple[str, ...] = ()) -> Option:
    """An option that changes nothing here."""
    return Option(
        name=name,
        apply=lambda scope, given: scope.ignore(given, reason),
        outcome="ignored",
        note=reason,
        aliases=aliases,
    )


def refused(
    name: str, reason: str, nearest: str = "", *, off: Sequence[Any] = OFF, aliases: tuple[str, ...] = ()
) -> Option:
    """An option that does not work here, unless it is switched off."""

    def apply(scope: Scope, given: Given) -> None:
        if is_off(given.value, off):
            scope.ignore(given, "it is off")
        else:
            scope.refuse(given, reason, nearest)

    note = f"{reason}; {nearest}" if nearest else reason
    return Option(name=name, apply=apply, outcome="refused", note=note, aliases=aliases)


def when(is_used: Callable[[Scope], bool], reason: str, options: Sequence[Option]) -> tuple[Option, ...]:
    """Options that mean something only under a condition; otherwise they are ignored with the reason."""

    def guarded(option: Option) -> Option:
        def apply(scope: Scope, given: Given) -> None:
            if is_used(scope):
                option.apply(scope, given)
            else:
                scope.ignore(given, reason)

        return replace(option, apply=apply, is_default_needed=is_used)

    return tuple(guarded(option) for option in options)


def apply_options(scope: Scope, table: Sequence[Option], unknown: str) -> None:
    """Apply a table to a scope: every key gets its line, and defaults that differ are written down.

    Args:
        unknown: what is said of a key that the table does not have.
    """
    apply_given(scope, scope.given, table, unknown)
    apply_defaults(scope, table)


def apply_given(scope: Scope, found: Mapping[str, Given], table: Sequence[Option], unknown: str) -> None:
    """Apply a table to some keys of a scope; see `apply_options`."""
    known = {option.name: option for option in table}
    for name, given in found.items():
        option = known.get(name)
        if option is None:
            near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
            scope.refuse(given, unknown, f"did you mean {near[0]}?" if near else "check its name, or remove it")
        elif given.value is None:
            scope.ignore(given, "null means that it is not given")
        else:
            option.apply(scope, given)


def apply_defaults(scope: Scope, table: Sequence[Option]) -> None:
    """Write SimpleTuner's defaults that are not Reverie's, of options that are not given."""
    for option in table:
        is_needed = option.is_default_needed is None or option.is_default_needed(scope)
        if option.default is not UNSET and is_needed and scope.value(option.name) is None:
            option.apply(scope, Given(name=option.name, key=option.name, value=option.default, is_default=True))


def resolve(
    document: Mapping[str, Any], table: Sequence[Option], plain: Callable[[str], str]
) -> tuple[dict[str, Given], list[Given]]:
    """Return the keys of an object by their option, aliases resolved, and those that say an option once more."""
    names = {alias: option.name for option in table for alias in (option.name, *option.aliases)}
    found: dict[str, Given] = {}
    again: list[Given] = []
    for key, value in document.items():
        name = names.get(plain(key), plain(key))
        given = Given(name=name, key=key, value=value)
        if name in found:
            again.append(given)
        else:
            found[name] = given
    return found, again


def parse_flag(value: Any) -> bool | None:
    """Return what a boolean, a number or a text means, None where it is neither true nor false."""
    if isinstance(value, bool):
        return value
    return {**BOOLEANS, "on": True, "off": False, "none": False, "": False}.get(str(value).strip().lower())


def parse_number(value: Any, *, is_whole: bool = False) -> float | int | None:
    """Return the number that a value or its text is, None where it is none (or not whole)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, int):
        return value
    try:
        found = float(value)
    except ValueError:
        return None
    if not math.isfinite(found):
        return None
    if is_whole:
        return int(found) if found == int(found) else None
    return found


def is_off(value: Any, off: Sequence[Any] = OFF) -> bool:
    """Whether a value switches its option off."""
    plain = value.strip().lower() if isinstance(value, str) else value
    return any(plain == each and isinstance(plain, bool) == isinstance(each, bool) for each in off)
