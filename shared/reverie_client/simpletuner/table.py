"""The table of every option, made from the key tables: for the docs and for `reverie import options`."""

from collections.abc import Mapping
from typing import Any

from reverie_client.simpletuner.keys import GROUPS
from reverie_client.simpletuner.report import shown
from reverie_client.simpletuner.rules import UNSET, Option


def options_table() -> str:
    """Return the table as Markdown, a section for each group."""
    sections = []
    for title, options in GROUPS.items():
        rows = [f"| {' | '.join(_row(option))} |" for option in options]
        head = ["| option | outcome | field | notes |", "|---|---|---|---|"]
        sections.append("\n".join([f"### {title}", "", *head, *rows]))
    return "\n\n".join(sections)


def options_as_json() -> Mapping[str, Any]:
    """Return the table as plain values."""
    return {
        title: [
            {
                "option": option.name,
                "aliases": list(option.aliases),
                "outcome": option.outcome,
                "field": option.field,
                "notes": _notes(option),
            }
            for option in options
        ]
        for title, options in GROUPS.items()
    }


def _row(option: Option) -> tuple[str, str, str, str]:
    names = ", ".join(f"`{name}`" for name in (option.name, *option.aliases))
    return names, option.outcome, option.field, _notes(option).replace("|", "\\|")


def _notes(option: Option) -> str:
    parts = [option.values, option.note]
    if option.default is not UNSET:
        parts.append(f"where it is missing, {_shown_default(option)} is written")
    return "; ".join(part for part in parts if part)


def _shown_default(option: Option) -> str:
    return f"SimpleTuner's {shown(option.default)}"
