"""YAML and JSON are read as people mean them."""

import math

import pytest
from reverie_client.documents import parse
from reverie_common.errors import InvalidArgumentError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: no", "no"),
        ("a: off", "off"),
        ("a: 2026-11-23", "2026-11-23"),
        ("a: 12:30", "12:30"),
        ("a: 4e-5", 4e-5),
        ("a: 1.", 1.0),
        ("a: .5", 0.5),
        ("a: 010", 10),
        ("a: true", True),
        ("a: ~", None),
        ("a:", None),
        ("a: .inf", math.inf),
        ('a: "4"', "4"),
        ('{"a": [1, 2,],}', [1, 2]),
        ('{"a": 1e-4}', 1e-4),
    ],
)
def test_reads_a_value(text: str, value: object) -> None:
    assert parse(text, "it") == {"a": value}


def test_reads_nan() -> None:
    assert math.isnan(parse("a: .nan", "it")["a"])


def test_merges_an_anchor() -> None:
    assert parse("base: &base {x: 1}\nmore:\n  <<: *base\n  y: 2", "it")["more"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 1\na: 2", "the mapping in line 1 has the key 'a' twice"),
        ('{"a": 1, "a": 2}', "has the key 'a' twice"),
        ("a: [1", "line 1, column 6"),
        ('{"a": 1 "b": 2}', "line 1, column 9"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("[1, 2]: 3", "a key must be a word"),
    ],
)
def test_refuses_a_document(text: str, why: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse(text, "job.yaml")
    assert why in caught.value.message
    assert caught.value.violations[0].field == "job.yaml"
