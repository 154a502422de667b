"""Starting, watching and stopping the services of one machine."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from reverie_common.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, UnavailableError
from reverie_common.ports import LOOPBACK, free_ports, require_free_port
from reverie_common.storage.seaweed import Seaweed

from reverie_client.stack.checkpoints import ensure_tiny
from reverie_client.stack.commands import service_command, service_environment
from reverie_client.stack.options import SERVICES, StackOptions
from reverie_client.stack.processes import (
    ProcessIdentity,
    end,
    identify,
    processes_of_stack,
)
from reverie_client.stack.state import ServiceRecord, StateDirectory

OnStep = Callable[[str, str], None]
"""Called with a service's name and what happens to it: `starting`, `ready`, `stopping`, `stopped`."""

POLL_SECONDS = 0.05
STOP_GRACE_SECONDS = 90.0
"""The trainer waits up to a minute for workers that save."""
TAIL_LINES = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadService:
    """A service that ended although nobody asked it to."""

    name: str
    exit_code: int
    """Negative: the number of the signal that ended it."""
    log_tail: str
    log_path: Path

    def describe(self) -> str:
        """Say what happened, with the end of its log."""
        how = f"exit code {self.exit_code}"
        if self.exit_code < 0:
            how = f"signal {signal.Signals(-self.exit_code).name}"
        return f"{self.name} ended ({how}); the end of its log {self.log_path}:\n{self.log_tail}"


def ignore_steps(_: str, __: str) -> None:
    """Do nothing."""


class Stack:
    """One embedded stack.

        with Stack(StackOptions(state_dir=directory).with_ephemeral_ports()) as stack:
            reverie = SyncReverie(stack.addresses["trainer"], sampler=stack.addresses["sampler"])

    Methods block. Ports, once chosen, stay for the life of the object, so that a service that was killed and started
    again is found where it was.
    """

    def __init__(self, options: StackOptions, *, on_step: OnStep = ignore_steps) -> None:
        """Starts nothing yet."""
        self.options = options
        self.state = StateDirectory(path=options.state_dir.absolute())
        self.addresses: dict[str, str] = {}
        """`host:port` of every service by name, from start() on."""
        self._on_step = on_step
        self._store: Seaweed | None = None
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._metrics_ports: dict[str, int] = {}
        self._checkpoint = ""
        self._is_stopping = False

    @property
    def store(self) -> Seaweed:
        """The embedded S3 server, from start() on."""
        if self._store is None:
            raise FailedPreconditionError("the stack was not started", reason="STACK_NOT_STARTED")
        return self._store

    @property
    def checkpoint(self) -> str:
        """The checkpoint that the services use, from start() on."""
        return self._checkpoint

    def start(self) -> None:
        """Start everything and wait until it serves; whatever was started is stopped again when that fails.

        Raises:
            FailedPreconditionError: the stack is up already, a port is in use, or something is not installed.
            UnavailableError: a service died or did not get ready; the message has the end of its log.
        """
        self.state.make()
        with self.state.locked():
            self._refuse_second_start()
            self._refuse_used_ports()
            try:
                self._start_all()
            except BaseException:
                self._stop_all(STOP_GRACE_SECONDS)
                raise

    def stop(self, *, grace_seconds: float = STOP_GRACE_SECONDS) -> None:
        """Stop everything in reverse order, workers included. May be repeated."""
        self._is_stopping = True
        self._stop_all(grace_seconds)

    def kill(self, name: str) -> None:
        """SIGKILL one service, as a crash would, and wait until it is gone."""
        process = self._process(name)
        process.kill()
        process.wait()

    def halt(self, name: str, *, grace_seconds: float = STOP_GRACE_SECONDS) -> None:
        """Stop one service as its operator would, and leave it stopped."""
        if name == "store":
            self.store.stop(timeout_seconds=grace_seconds)
            return
        process = self._process(name)
        end([identity for identity in [_identity(process)] if identity], grace_seconds)
        process.wait()

    def restart(self, name: str) -> None:
        """Start one service again at its old address, stopping it first if it runs; wait until it serves."""
        self.halt(name)
        if name == "store":
            self.store.start()
        else:
            self._launch(name, is_first=False)
            self._wait_ready([name])
        self._save()

    def pid(self, name: str) -> int:
        """Process id of a service."""
        return self._process(name).pid

    def dead(self) -> list[DeadService]:
        """Return the services that ended although nobody asked them to."""
        if self._is_stopping:
            return []
        running = {name: self._process(name) for name in self.addresses if self._has_process(name)}
        return [self._post_mortem(name, process) for name, process in running.items() if process.poll() is not None]

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()

    def _start_all(self) -> None:
        self._checkpoint = self._resolve_checkpoint()
        self._choose_addresses()
        self._start_store()
        services = [name for name in SERVICES if name != "store"]
        for name in services:
            self._launch(name, is_first=True)
            self._save()
        self._wait_ready(services)

    def _refuse_second_start(self) -> None:
        alive = {name: record.pid for name, record in self.state.load().items() if record.process.is_alive}
        if alive:
            running = ", ".join(f"{name} (process {pid})" for name, pid in alive.items())
            raise FailedPreconditionError(
                f"a stack is up already in {self.state.path}: {running}; stop it with "
                f"`reverie down --state-dir {self.state.path}`, or choose another --state-dir",
                reason="STACK_IS_UP",
                metadata={"state_dir": str(self.state.path)},
            )

    def _refuse_used_ports(self) -> None:
        for name, port in self.options.ports.items():
            if port:
                require_free_port(LOOPBACK, port, f"--{name}-port (or use --ephemeral-ports)")
        for name, port in self.options.metrics_ports.items():
            if port:
                require_free_port(LOOPBACK, port, f"metrics port of the {name}: --ephemeral-ports")

    def _resolve_checkpoint(self) -> str:
        given = self.options.checkpoint
        if given is None:
            self._on_step("checkpoint", "making the tiny checkpoint")
            return str(ensure_tiny(self.state.checkpoints))
        is_path = given.startswith((".", "/", "~"))
        path = Path(given).expanduser()
        if is_path and not path.is_dir():
            raise NotFoundError(
                f"the checkpoint {given} is not a directory; give the directory of a HiDream-I1 checkpoint, an s3:// "
                "prefix or a Hub id, or leave --checkpoint out to use a tiny one",
                reason="NO_CHECKPOINT",
            )
        return str(path.absolute()) if path.is_dir() else given

    def _choose_addresses(self) -> None:
        free = free_ports(len(SERVICES) * 2)
        for name in SERVICES:
            port = self.options.ports.get(name, 0) or free.pop()
            self.addresses.setdefault(name, f"{LOOPBACK}:{port}")
            if name != "store":
                self._metrics_ports.setdefault(name, self.options.metrics_ports.get(name, 0) or free.pop())

    def _start_store(self) -> None:
        self._on_step("store", "starting")
        keys = self.state.credentials()
        self._store = Seaweed(
            self.state.store,
            port=int(self.addresses["store"].rpartition(":")[2]),
            access_key=keys.access_key,
            secret_key=keys.secret_key,
            log_path=self.state.log("store"),
        )
        self._store.start()
        self._save()
        self._on_step("store", "ready")

    def _launch(self, name: str, *, is_first: bool) -> None:
        self._on_step(name, "starting")
        self.state.ready_file(name).unlink(missing_ok=True)
        command = service_command(
            name,
            options=self.options,
            state=self.state,
            checkpoint=self._checkpoint,
            addresses=self.addresses,
            metrics_port=self._metrics_ports[name],
        )
        environment = service_environment(self.options, self.state, self.store.environment)
        with self.state.log(name).open("wb" if is_first else "ab") as log:
            self._processes[name] = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal goes to every process of its session; services are stopped in order instead.
                start_new_session=True,
            )

    def _wait_ready(self, names: list[str]) -> None:
        deadline = time.monotonic() + self.options.ready_timeout_seconds
        waiting = list(names)
        while waiting:
            for name in [name for name in waiting if self._is_ready(name)]:
                waiting.remove(name)
                self._on_step(name, "ready")
            if waiting and time.monotonic() > deadline:
                raise UnavailableError(
                    f"not ready within {self.options.ready_timeout_seconds:.0f} s: {', '.join(waiting)}; see "
                    f"{self.state.logs}",
                    reason="STACK_NOT_READY",
                )
            time.sleep(POLL_SECONDS)

    def _is_ready(self, name: str) -> bool:
        process = self._processes[name]
        if process.poll() is not None:
            raise UnavailableError(self._post_mortem(name, process).describe(), reason="SERVICE_DIED")
        path = self.state.ready_file(name)
        return path.exists() and json.loads(path.read_text())["pid"] == process.pid

    def _stop_all(self, grace_seconds: float) -> None:
        for names in (["trainer"], ["sampler", "vae", "encoder"]):
            self._stop_services(names, grace_seconds)
            if names == ["trainer"]:
                self._stop_workers(grace_seconds)
        if self._store is not None and self._store.process is not None:
            self._on_step("store", "stopping")
            self._store.stop(timeout_seconds=grace_seconds)
            self._on_step("store", "stopped")
        self.state.save({})

    def _stop_services(self, names: list[str], grace_seconds: float) -> None:
        stopping = {name: self._processes[name] for name in names if name in self._processes}
        for name in stopping:
            self._on_step(name, "stopping")
        end([identity for process in stopping.values() if (identity := _identity(process))], grace_seconds)
        for name, process in stopping.items():
            process.wait()
            self._on_step(name, "stopped")

    def _stop_workers(self, grace_seconds: float) -> None:
        """End what the trainer started and left behind; workers run in sessions of their own."""
        ours = {process.pid for process in self._processes.values()}
        end([found for found in processes_of_stack(self.state.path) if found.pid not in ours], grace_seconds)

    def _process(self, name: str) -> subprocess.Popen[bytes]:
        process = self.store.process if name == "store" else self._processes.get(name)
        if process is None:
            raise InvalidArgumentError(f"the service {name!r} was not started; there are {', '.join(SERVICES)}")
        return process

    def _has_process(self, name: str) -> bool:
        return name in self._processes or (name == "store" and self._store is not None)

    def _post_mortem(self, name: str, process: subprocess.Popen[bytes]) -> DeadService:
        path = self.state.log(name)
        return DeadService(name=name, exit_code=process.returncode, log_tail=tail(path), log_path=path)

    def _save(self) -> None:
        self.state.save({name: record for name in SERVICES if (record := self._record(name)) is not None})

    def _record(self, name: str) -> ServiceRecord | None:
        if not self._has_process(name):
            return None
        identity = _identity(self._process(name))
        if identity is None:
            return None
        return ServiceRecord(
            pid=identity.pid,
            start_ticks=identity.start_ticks,
            address=self.addresses[name],
            metrics_port=self._metrics_ports.get(name, 0),
        )


def stop_recorded(
    state: StateDirectory, *, on_step: OnStep = ignore_steps, grace_seconds: float = STOP_GRACE_SECONDS
) -> list[str]:
    """Stop the stack that a state directory's record names, in reverse order; returns the services that ran."""
    records: Mapping[str, ServiceRecord] = state.load()
    stopped: list[str] = []
    for name in reversed(SERVICES):
        if name == "store":  # last: workers and services may still be writing to it
            left = processes_of_stack(state.path)
            end(left, grace_seconds)
        record = records.get(name)
        if record is not None and record.process.is_alive:
            on_step(name, "stopping")
            end([record.process], grace_seconds)
            on_step(name, "stopped")
            stopped.append(name)
        if name == "trainer":
            services = {other.pid for other in records.values()}
            end([found for found in processes_of_stack(state.path) if found.pid not in services], grace_seconds)
    state.save({})
    return stopped


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """Return the last lines of a log, JSON records as their level and message."""
    if not path.exists():
        return "(no log)"
    return "\n".join(_readable(line) for line in path.read_text(errors="replace").splitlines()[-lines:])


def _readable(line: str) -> str:
    try:
        record = json.loads(line)
        return f"{record['level']}: {record['message']}"
    except (ValueError, KeyError, TypeError):
        return line


def _identity(process: subprocess.Popen[bytes]) -> ProcessIdentity | None:
    """Return who a child is, or None when it has ended; a child's number stays its own until it is waited for."""
    if process.poll() is not None:
        return None
    with suppress(ProcessLookupError):
        return identify(process.pid)
    return None
