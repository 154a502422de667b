"""Reading YAML and JSON as people mean it: no surprises of YAML 1.1, no key twice, never any code.

Against PyYAML's safe loader: `no`, `off` and dates are text, `4e-5` is a number, and a repeated key is an error.
"""

import json
import re
from typing import Any

import yaml
from reverie_common.errors import FieldViolation, InvalidArgumentError


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema on PyYAML's safe loader."""


# PyYAML keeps a resolver table for each first character; a fresh one holds nothing of YAML 1.1.
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", r"<<", "<"),
):
    _first_characters = [*_first.replace("\0", ""), *([""] if "\0" in _first else [])]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first_characters)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    loader.flatten_mapping(node)
    pairs = [(_key(key), loader.construct_object(value, deep=True)) for key, value in node.value]
    return _unique(pairs, f" in line {node.start_mark.line + 1}")


def _key(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.constructor.ConstructorError(None, None, "a key must be a word", node.start_mark)
    return str(node.value)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


class _DuplicateKeyError(ValueError):
    """One key stands twice in one mapping."""


def _unique(pairs: list[tuple[str, Any]], where: str = "") -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise _DuplicateKeyError(f"the mapping{where} has the key {twice[0]!r} twice; remove one")
    return dict(pairs)


def parse(text: str, name: str) -> Any:
    """Return what a YAML or JSON document says.

    Args:
        text: the document.
        name: what to call it in an error.

    Raises:
        InvalidArgumentError: where the document cannot be read, with line and column.
    """
    try:
        if text.lstrip().startswith("{"):
            return _parse_json(text)
        return _parse_yaml(text)
    except _DuplicateKeyError as error:
        raise _refusal(name, str(error)) from None
    except yaml.YAMLError as error:
        raise _refusal(name, _place_of(error)) from None
    except RecursionError:
        raise _refusal(name, "it is nested too deeply") from None


def _parse_json(text: str) -> Any:
    """Read JSON; what is not strict JSON, such as a trailing comma or a comment, gets a second chance as YAML."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        try:
            return _parse_yaml(text)
        except yaml.YAMLError:
            message = f"line {error.lineno}, column {error.colno}: {error.msg}"
            raise yaml.YAMLError(message) from None


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - derived from SafeLoader: it makes plain values only


def _place_of(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error).strip()


def _refusal(name: str, why: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{name} is neither YAML nor JSON: {why}",
        reason="UNREADABLE_DOCUMENT",
        violations=[FieldViolation(field=name, description=why)],
    )
