"""Digests of a checkpoint's files, read once: tens of gigabytes take a minute, and services start often."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from reverie_common.storage.keys import content_digest

logger = logging.getLogger(__name__)

# Everything that decides a result: configuration, weights, tokenizers. Not READMEs or pictures.
_SUFFIXES = (".json", ".safetensors", ".txt", ".model")
# Smaller files are read faster than their remembered digest.
_REMEMBERED_BYTES = 64 * 1024 * 1024


def files_fingerprint(directories: Sequence[Path]) -> str:
    """Hex sha256 over the relative names and the contents of the directories' own files, sub-folders left out.

    It does not depend on where the directories are.
    """
    return content_digest({"directories": [_digests(directory) for directory in directories]})


def forget_digests() -> None:
    """Forget what this process read, not what the user's cache remembers: as a new process would start."""
    _digest_of_state.cache_clear()


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    return {path.name: _digest(path) for path in files}


def _digest(path: Path) -> str:
    status = path.stat()
    # The change time cannot be set from outside, so a file that was put in another's place is noticed.
    return _digest_of_state(path.resolve(), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@lru_cache(maxsize=4096)
def _digest_of_state(path: Path, size_bytes: int, *identity: int) -> str:
    if size_bytes < _REMEMBERED_BYTES:
        return _read(path)
    memory = _memory_file(path)
    state = [size_bytes, *identity]
    remembered = _remembered(memory)
    if remembered.get("state") == state:
        return str(remembered["sha256"])
    digest = _read(path)
    _remember(memory, {"path": str(path), "state": state, "sha256": digest})
    return digest


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _memory_file(path: Path) -> Path:
    return Path.home() / ".cache" / "reverie" / "digests" / f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"


def _remembered(memory: Path) -> dict[str, object]:
    try:
        content = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remember(memory: Path, content: dict[str, object]) -> None:
    scratch = memory.with_suffix(f".{os.getpid()}.tmp")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(content), encoding="utf-8")
        scratch.replace(memory)
    except OSError as error:
        # A read-only home costs the next start a minute, nothing else.
        logger.info("digest of %s is not remembered: %s", content["path"], error)
