"""Tiny checkpoints: made by a process of its own, because the client never imports torch."""

import hashlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from reverie_common.errors import FailedPreconditionError, ReverieError

TIMEOUT_SECONDS = 300


def make_tiny(directory: Path, *, seed: int = 0) -> None:
    """Write the tiny checkpoint to a directory. Blocks for about six seconds.

    Raises FailedPreconditionError when the model's package is not installed, ReverieError when it fails.
    """
    command = [sys.executable, "-m", "reverie_hidream.tiny", str(directory), "--seed", str(seed)]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    if done.returncode == 0:
        return
    tail = "\n".join(done.stderr.strip().splitlines()[-5:])
    if "ModuleNotFoundError" in tail:
        raise FailedPreconditionError(
            f"the model's libraries are not installed ({tail.splitlines()[-1]}); install reverie[standalone]",
            reason="NOT_INSTALLED",
        )
    raise ReverieError(f"the tiny checkpoint could not be made:\n{tail}", reason="TINY_CHECKPOINT_FAILED")


def ensure_tiny(checkpoints: Path) -> Path:
    """Return the tiny checkpoint below `checkpoints`, made at the first call and again when its code changed."""
    directory = checkpoints / f"tiny-{_code_digest()[:12]}"
    if (directory / "model_index.json").exists():
        return directory
    make_tiny(directory)
    return directory


def _code_digest() -> str:
    package = find_spec("reverie_hidream")
    if package is None or package.origin is None:
        raise FailedPreconditionError(
            "the model's package is not installed; install reverie[standalone]", reason="NOT_INSTALLED"
        )
    sources = sorted(Path(package.origin).parent.glob("tiny*"))
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() if source.is_file() else b"")
    return digest.hexdigest()
