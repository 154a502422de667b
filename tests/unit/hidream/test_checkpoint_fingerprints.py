"""Digests of big files are read once and remembered in the user's cache."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from reverie_hidream.fingerprints import files_fingerprint, forget_digests

BIG_BYTES = 65 * 1024 * 1024


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    forget_digests()
    return tmp_path / "home"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a big sparse file."""
    directory = tmp_path / "transformer"
    directory.mkdir()
    with (directory / "model.safetensors").open("wb") as file:
        file.truncate(BIG_BYTES)
    return directory


def memory_of(home: Path) -> Path:
    """The one file that remembers a digest."""
    (memory,) = (home / ".cache" / "reverie" / "digests").iterdir()
    return memory


def test_remembers_the_digest_of_a_big_file(directory: Path, home: Path) -> None:
    files_fingerprint([directory])
    remembered = json.loads(memory_of(home).read_text(encoding="utf-8"))
    assert remembered["sha256"] == hashlib.sha256(bytes(BIG_BYTES)).hexdigest()


def test_the_next_process_trusts_the_memory(directory: Path, home: Path) -> None:
    before = files_fingerprint([directory])
    memory = memory_of(home)
    memory.write_text(memory.read_text(encoding="utf-8").replace('"sha256": "', '"sha256": "x'), encoding="utf-8")
    assert files_fingerprint([directory]) == before
    forget_digests()
    assert files_fingerprint([directory]) != before


def test_a_file_put_in_its_place_with_the_same_times_is_read_again(directory: Path) -> None:
    before = files_fingerprint([directory])
    weights, other = directory / "model.safetensors", directory / "other"
    status = weights.stat()
    with other.open("wb") as file:
        file.write(b"x")
        file.truncate(BIG_BYTES)
    other.replace(weights)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    forget_digests()
    assert files_fingerprint([directory]) != before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": []}'])
def test_a_damaged_memory_is_made_again(directory: Path, home: Path, content: str) -> None:
    before = files_fingerprint([directory])
    memory = memory_of(home)
    memory.write_text(content, encoding="utf-8")
    forget_digests()
    assert files_fingerprint([directory]) == before
    assert "sha256" in json.loads(memory.read_text(encoding="utf-8"))


def test_works_without_a_writable_home(directory: Path, home: Path) -> None:
    home.write_text("not a directory", encoding="utf-8")
    assert len(files_fingerprint([directory])) == 64


def test_small_files_leave_no_memory(tmp_path: Path, home: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}", encoding="utf-8")
    files_fingerprint([tmp_path / "vae"])
    assert not home.exists()
