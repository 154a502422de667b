"""SimpleTuner's files as people write them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reverie_client.simpletuner import Imported, import_configuration
from reverie_client.simpletuner.reading import open_config, parse_json
from reverie_common.errors import InvalidArgumentError, NotFoundError

Bring = Callable[..., Imported]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": [1, 2,], "b": {"c": 3,},}', {"a": [1, 2], "b": {"c": 3}}),
        ('{"a": 1, // one\n "b": 2 /* two\n lines */, # three\n}', {"a": 1, "b": 2}),
        ('{"a": "x, ]", "b": "// no /* comment # ,}"}', {"a": "x, ]", "b": "// no /* comment # ,}"}),
        ('{"a": "a \\" quote, ]",}', {"a": 'a " quote, ]'}),
        ('{\t"a":\t1,\n\t}', {"a": 1}),
        ("[]", []),
    ],
)
def test_trailing_commas_and_comments_are_tolerated(text: str, expected: Any) -> None:
    assert parse_json(text, "x") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b" 2}', "line 2, column 6"),
        ('{"a": 1, "a": 2}', "'a' twice"),
        ('{"a": "unfinished', "Unterminated string"),
        ("[1,,]", "line 1"),
    ],
)
def test_what_is_not_json_is_told_with_its_place(text: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        parse_json(text, "x")


@pytest.mark.parametrize(
    "where",
    [
        "multidatabackend.json",
        "config/multidatabackend.json",
        "config/hidream/multidatabackend.json",
        "hidream/multidatabackend.json",
    ],
)
def test_paths_are_found_from_where_simpletuner_runs(tmp_path: Path, where: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "multidatabackend.json").write_text("[]")
    assert open_config(tmp_path).find(where) == tmp_path / "multidatabackend.json"


def test_a_file_above_the_folder_is_found_first(tmp_path: Path) -> None:
    (tmp_path / "config" / "hidream").mkdir(parents=True)
    (tmp_path / "config" / "config.json").write_text("{}")
    for name in ("config/hidream/data.json", "config/data.json"):
        (tmp_path / name).write_text("[]")
    assert open_config(tmp_path / "config").find("config/hidream/data.json") == tmp_path / "config/hidream/data.json"


@pytest.mark.parametrize("name", ["config.toml", "config.env"])
def test_other_formats_are_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(InvalidArgumentError, match=r"config\.json"):
        open_config(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"config\.json"):
        open_config(tmp_path / name)


def test_a_folder_without_configuration_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no config\.json"):
        open_config(tmp_path)


def test_a_named_file_that_is_missing_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"data_backend_config": "config/none.json"}))
    with pytest.raises(NotFoundError, match=r"data_backend_config names config/none\.json"):
        import_configuration(tmp_path)


@pytest.mark.parametrize("key", ["seed", "--seed", "-seed"])
def test_dashes_before_keys_are_tolerated(bring: Bring, key: str) -> None:
    assert bring({key: 7}).document["seed"] == 7


def test_a_key_in_two_spellings_is_refused(bring: Bring) -> None:
    refused = [line for line in bring({"seed": 7, "--seed": 8}).report.lines if line.outcome == "refused"]
    assert [(line.key, "says the same" in line.reason) for line in refused] == [("--seed", True)]
