"""Secrets of the trainer by name: files in one directory. Jobs name them; what they say is in no job, event or log."""

import re
from dataclasses import dataclass
from pathlib import Path

SECRET_NAME = re.compile(r"[a-z0-9_-]{1,63}")

MAX_SECRET_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Secrets:
    """Read anew at every use, so that a secret can be changed while the trainer runs."""

    directory: Path | None
    """None holds no secrets."""

    def problem(self, name: str) -> str | None:
        """Return why a name stands for no secret, None where it does."""
        if not SECRET_NAME.fullmatch(name):
            return f"{name[:80]!r} is no name of a secret; use 1 to 63 of [a-z0-9_-]"
        if self.directory is None:
            return f"secret {name!r} is unknown: the trainer was started without --secrets-dir"
        if self.read(name) is None:
            return f"secret {name!r} is unknown; put it into a file of that name in the trainer's secrets directory"
        return None

    def read(self, name: str) -> str | None:
        """Return a secret without the white space around it, None where there is none."""
        if self.directory is None or not SECRET_NAME.fullmatch(name):
            return None
        try:
            with (self.directory / name).open("rb") as file:
                text = file.read(MAX_SECRET_BYTES + 1)
        except OSError:
            return None
        return text.decode("utf-8", "replace").strip() or None if len(text) <= MAX_SECRET_BYTES else None
