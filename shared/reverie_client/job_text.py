"""A job file as text: YAML in the order of the contract, with comments above the lines that they are about."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

SHORT = 100
"""Characters of a list or mapping that is written on one line."""


def job_text(document: Mapping[str, Any], comments: Mapping[str, str], head: str = "") -> str:
    """Return a job file.

    Args:
        document: the job, as plain values in the order to write.
        comments: what to say of a field, by its dotted path.
        head: what to say of the whole file; may have several lines.
    """
    lines = [f"# {line}".rstrip() for line in head.splitlines()]
    return "\n".join([*lines, *_mapping(document, comments, "", "")]) + "\n"


def _mapping(values: Mapping[str, Any], comments: Mapping[str, str], path: str, indent: str) -> Iterator[str]:
    for key, value in values.items():
        here = f"{path}.{key}" if path else str(key)
        for line in comments.get(here, "").splitlines():
            yield f"{indent}# {line}"
        yield from _entry(_scalar(str(key)), value, comments, here, indent)


def _entry(key: str, value: Any, comments: Mapping[str, str], path: str, indent: str) -> Iterator[str]:
    is_commented = any(each.startswith(f"{path}.") for each in comments)
    if isinstance(value, Mapping) and value and (is_commented or _is_long(value, indent) or not indent):
        yield f"{indent}{key}:"
        yield from _mapping(value, comments, path, f"{indent}  ")
    elif isinstance(value, Sequence) and not isinstance(value, str) and value and _is_long(value, indent):
        yield f"{indent}{key}:"
        for item in value:
            yield from _item(item, indent)
    else:
        yield f"{indent}{key}: {_scalar(value)}"


def _item(item: Any, indent: str) -> Iterator[str]:
    if not isinstance(item, Mapping) or not _is_long(item, indent):
        yield f"{indent}  - {_scalar(item)}"
        return
    for number, line in enumerate(_mapping(item, {}, "", f"{indent}    ")):
        yield f"{indent}  - {line.lstrip()}" if number == 0 else line


def _is_long(value: Any, indent: str) -> bool:
    return len(_scalar(value)) + len(indent) > SHORT or (isinstance(value, Mapping) and len(value) > 3)


def _scalar(value: Any) -> str:
    """Return a value on one line, in quotes where it would be read as something else."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("...").removesuffix("\n")
