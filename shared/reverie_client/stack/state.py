"""What a stack keeps in its state directory."""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reverie_common.errors import FailedPreconditionError

from reverie_client.stack.processes import ProcessIdentity

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """Keys of the embedded store, random, made once."""

    access_key: str
    secret_key: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceRecord:
    """One service that was started."""

    pid: int
    start_ticks: int
    address: str
    metrics_port: int
    """0 for the store, which has none of ours."""

    @property
    def process(self) -> ProcessIdentity:
        """The process."""
        return ProcessIdentity(pid=self.pid, start_ticks=self.start_ticks)


@dataclass(frozen=True, kw_only=True, slots=True)
class StateDirectory:
    """Paths below one state directory."""

    path: Path

    @property
    def logs(self) -> Path:
        """One log for each service."""
        return self.path / "logs"

    @property
    def store(self) -> Path:
        """Objects of the embedded store."""
        return self.path / "store"

    @property
    def checkpoints(self) -> Path:
        """Tiny checkpoints."""
        return self.path / "checkpoints"

    def log(self, service: str) -> Path:
        """Log of one service."""
        return self.logs / f"{service}.log"

    def ready_file(self, service: str) -> Path:
        """Written by a service once it serves."""
        return self.path / "ready" / f"{service}.json"

    def service_dir(self, service: str) -> Path:
        """What one service keeps for itself."""
        return self.path / service

    def make(self) -> None:
        """Create the folders; nobody else on this machine may read them."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o700)
        for folder in (self.logs, self.store, self.checkpoints, self.path / "ready", self.service_dir("trainer")):
            folder.mkdir(exist_ok=True)

    def credentials(self) -> Credentials:
        """Return the store's keys, made at the first call and kept in a file of mode 0600."""
        path = self.path / "credentials.json"
        if not path.exists():
            made = Credentials(access_key=secrets.token_hex(10), secret_key=secrets.token_hex(20))
            _write(path, asdict(made), mode=0o600)
        return Credentials(**json.loads(path.read_text()))

    def save(self, services: Mapping[str, ServiceRecord]) -> None:
        """Write down which services run; none removes the record."""
        if not services:
            self._record.unlink(missing_ok=True)
            return
        document = {"format": FORMAT, "services": {name: asdict(record) for name, record in services.items()}}
        _write(self._record, document, mode=0o600)

    def load(self) -> dict[str, ServiceRecord]:
        """Return the services that were started and not stopped, whether they still live or not."""
        if not self._record.exists():
            return {}
        document = json.loads(self._record.read_text())
        if document.get("format") != FORMAT:
            raise FailedPreconditionError(
                f"{self._record} was written by another version of Reverie (format {document.get('format')}, expected "
                f"{FORMAT}); stop its processes with that version's `reverie down`, or remove the file"
            )
        return {name: ServiceRecord(**entry) for name, entry in document["services"].items()}

    @property
    def _record(self) -> Path:
        return self.path / "stack.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory against another start or stop. Raises FailedPreconditionError at once when it is held."""
        with (self.path / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FailedPreconditionError(
                    f"another `reverie` starts or stops the stack in {self.path} right now; wait for it, or choose "
                    "another --state-dir",
                    reason="STACK_LOCKED",
                ) from None
            yield


def _write(path: Path, document: Mapping[str, Any], *, mode: int) -> None:
    """Write a JSON file so that a reader sees the old or the new one, never a part."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as out:
        json.dump(document, out, indent=2)
        out.flush()
        os.fsync(out.fileno())
    part.replace(path)
