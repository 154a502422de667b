"""SimpleTuner's prompt libraries, read as they are."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from reverie.training.v1.job_pb2 import TrainingJobSpec
from reverie_client.prompt_library import (
    PromptLibrary,
    add_prompts,
    parse_prompt_library,
    read_prompt_library,
    safe_name,
)
from reverie_common.errors import InvalidArgumentError, NotFoundError


def read(document: Any, **arguments: Any) -> PromptLibrary:
    return parse_prompt_library(document, name="library.json", **arguments)


def names(library: PromptLibrary) -> list[str]:
    return [prompt.name for prompt in library.prompts]


@pytest.mark.parametrize(
    ("short_name", "expected"),
    [
        ("anime_<token>", "anime_token"),
        ("cat", "cat"),
        ("Photo of a Cat", "photo_of_a_cat"),
        ("caf\u00e9", "cafe"),
        ("../../etc/passwd", "etc_passwd"),
        ("con:trol?*", "control"),
        ("lib-cat", "user-lib-cat"),
        ("x" * 200, "x" * 63),
        ("\u732b", "prompt-a810bf84"),
        ("", "prompt-e3b0c442"),
    ],
)
def test_short_names_are_made_safe_for_files(short_name: str, expected: str) -> None:
    assert safe_name(short_name) == expected
    assert re.fullmatch(r"[a-z0-9_-]{1,63}", safe_name(short_name))


def test_prompts_keep_their_text_their_order_and_their_strength() -> None:
    library = read({"b": "a <token> & more", "a": {"prompt": "other", "adapter_strength": "0.5"}})
    assert [(one.name, one.prompt) for one in library.prompts] == [("b", "a <token> & more"), ("a", "other")]
    assert not library.prompts[0].HasField("adapter_strength")
    assert library.prompts[1].adapter_strength == 0.5
    assert library.notes == ()


def test_names_stay_unique_the_same_way_every_time() -> None:
    document = {"cat!": "1", "cat?": "2", "cat": "3", "unconditional": "4", "y" * 70: "5", "y" * 71: "6"}
    library = read(document, taken=["cat-2"])
    assert names(library) == ["cat", "cat-3", "cat-4", "unconditional-2", "y" * 63, "y" * 61 + "-2"]
    assert read(document, taken=["cat-2"]) == library


def test_every_change_is_told() -> None:
    library = read({"anime_<token>": {"prompt": "a", "images": []}})
    assert library.notes == (
        "prompt 'anime_<token>': 'images' means nothing here and is left out",
        "prompt 'anime_<token>' is named anime_token, because names become file names",
    )


def test_everything_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(InvalidArgumentError, match=r"3 prompts are wrong in library\.json") as refusal:
        read({"a": 1, "b": {"text": "x"}, "c": {"prompt": "x", "adapter_strength": "strong"}, "d": "fine"})
    assert [violation.field for violation in refusal.value.violations] == ["a", "b", "c.adapter_strength"]


@pytest.mark.parametrize("document", [[], "text", 3])
def test_something_else_is_no_library(document: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="from short names to prompts"):
        read(document)


def test_a_file_is_added_to_what_the_job_says(tmp_path: Path) -> None:
    file = tmp_path / "user_prompt_library.json"
    file.write_text('{"cat": "a cat", "anime_<token>": "anime",}', encoding="utf-8")
    spec = TrainingJobSpec()
    spec.validation.prompts.add(name="cat", prompt="my own cat")
    notes = add_prompts(spec, file)
    assert [(one.name, one.prompt) for one in spec.validation.prompts] == [
        ("cat", "my own cat"),
        ("cat-2", "a cat"),
        ("anime_token", "anime"),
    ]
    assert len(notes) == 2


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nowhere\.json does not exist"):
        read_prompt_library(tmp_path / "nowhere.json")


def test_the_reference_library_can_be_read(tmp_path: Path) -> None:
    # The form of the guide: angle brackets in names and prompts.
    library = {"anime_<token>": "a breathtaking anime-style portrait of <token>", "chef_<token>": "<token> as a chef"}
    file = tmp_path / "library.json"
    file.write_text(json.dumps(library), encoding="utf-8")
    assert names(read_prompt_library(file)) == ["anime_token", "chef_token"]
