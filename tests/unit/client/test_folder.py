"""Folders of pictures and captions: every problem at once."""

import hashlib
from pathlib import Path

import pytest
from reverie_client.folder import read_folders
from reverie_common.errors import InvalidArgumentError

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart" / "photos"


def add(folder: Path, name: str, caption: bytes | None = b"a caption", body: bytes = b"pixels") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption)
    return path


def violations_of(*folders: Path, needs_captions: bool = True) -> dict[str, str]:
    with pytest.raises(InvalidArgumentError) as caught:
        read_folders(folders, needs_captions=needs_captions)
    return {violation.field: violation.description for violation in caught.value.violations}


def test_reads_the_quickstart() -> None:
    local = read_folders([QUICKSTART])
    assert len(local.samples) >= 12
    assert not local.ignored
    assert all(sample.captions for sample in local.samples)


def test_reads_names_digests_and_several_captions(tmp_path: Path) -> None:
    add(tmp_path, "a/b.JPG", "\ufeffone\n\n  two \r\n".encode())
    (sample,) = read_folders([tmp_path]).samples
    assert sample.name == "a/b.JPG"
    assert sample.captions == ("one", "two")
    assert sample.sha256 == hashlib.sha256(b"pixels").hexdigest()
    assert sample.size_bytes == 6


def test_passes_over_hidden_files_and_names_what_is_neither_picture_nor_caption(tmp_path: Path) -> None:
    add(tmp_path, "a.png")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not a caption")
    (tmp_path / "video.mp4").write_bytes(b"")
    local = read_folders([tmp_path])
    assert [sample.name for sample in local.samples] == ["a.png"]
    assert [path.name for path in local.ignored] == ["notes.txt", "video.mp4"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert "does not exist" in violations_of(tmp_path / "none")[str(tmp_path / "none")]


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    picture = add(tmp_path, "a.png")
    assert "give the folder" in violations_of(picture)[str(picture)]


def test_an_empty_folder_has_no_images_detected(tmp_path: Path) -> None:
    assert "no images detected in dataset: it is empty" in violations_of(tmp_path)[str(tmp_path)]


def test_a_folder_of_other_files_has_no_images_detected(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(b"")
    assert "no images detected in dataset: it holds 1 other files" in violations_of(tmp_path)[str(tmp_path)]


def test_a_missing_caption_is_a_problem_unless_the_job_has_an_instance_prompt(tmp_path: Path) -> None:
    picture = add(tmp_path, "a.png", None)
    assert "a.txt" in violations_of(tmp_path)[str(picture)]
    assert read_folders([tmp_path], needs_captions=False).samples[0].captions == ()


def test_an_empty_caption_file_is_a_problem(tmp_path: Path) -> None:
    picture = add(tmp_path, "a.png", b"\n  \n")
    assert "empty" in violations_of(tmp_path)[str(picture.with_suffix(".txt"))]


@pytest.mark.parametrize(
    ("caption", "what"),
    [
        (b"caf\xe9 au lait", "byte 0xe9 at offset 3"),
        ("a photo".encode("utf-16"), "iconv -f UTF-16"),
    ],
)
def test_a_caption_that_is_not_utf8_is_named_with_the_offset(tmp_path: Path, caption: bytes, what: str) -> None:
    picture = add(tmp_path, "a.png", caption)
    assert what in violations_of(tmp_path)[str(picture.with_suffix(".txt"))]


def test_a_caption_that_is_too_long_is_named_with_its_line(tmp_path: Path) -> None:
    picture = add(tmp_path, "a.png", b"short\n" + b"x" * 10_000)
    found = violations_of(tmp_path)[f"{picture.with_suffix('.txt')}:2"]
    assert "10000 characters" in found
    assert "8192" in found


def test_equal_names_in_two_folders_are_a_problem(tmp_path: Path) -> None:
    add(tmp_path, "one/a.png")
    second = add(tmp_path, "two/a.png")
    assert "names are unique" in violations_of(tmp_path / "one", tmp_path / "two")[str(second)]


def test_a_name_that_is_too_long_is_a_problem(tmp_path: Path) -> None:
    picture = add(tmp_path, f"{'d' * 200}/{'f' * 100}.png")
    assert "305 characters" in violations_of(tmp_path)[str(picture)]


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    add(tmp_path, "a.png", None)
    add(tmp_path, "b.png", b"\xff")
    add(tmp_path, "c.png", b"x" * 9000)
    assert len(violations_of(tmp_path, tmp_path / "none")) == 4
