"""Starting workers, and knowing whether they are alive; here as processes of this machine."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from reverie_common.process import child_environment

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "REVERIE_WORKER_TOKEN"  # noqa: S105  # the name of a variable, not a secret

_LAST_LINES = 20
_EXIT_SECONDS = 5.0
_LONGEST_PAUSE_SECONDS = 60.0


class Launcher(Protocol):
    """Starts the worker of a job and finds it again. What `start` returns is kept in the database as it is."""

    def start(self, job_id: str, token: str, number: int) -> dict[str, str]:
        """Start a worker for a job, the `number`-th one from 1; return how it is found again. Blocks."""
        ...

    def is_alive(self, process: Mapping[str, str]) -> bool:
        """Whether a worker still runs, also one that an earlier trainer started."""
        ...

    def stop(self, process: Mapping[str, str]) -> None:
        """Ask a worker to save and to exit; returns at once."""
        ...

    def kill(self, process: Mapping[str, str]) -> None:
        """End a worker now; returns at once."""
        ...

    def last_lines(self, process: Mapping[str, str]) -> list[str]:
        """Return the end of a worker's log."""
        ...

    def warm_up(self) -> None:
        """Make the next start fast; returns at once, may be called often."""
        ...

    def close(self) -> None:
        """End what was kept warm, and workers that have completed their jobs and not exited yet."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerCommand:
    """How a worker is started on this machine."""

    arguments: Sequence[str]
    """Flags that every worker gets: where the trainer, the sampler and the checkpoint are."""
    environment: Mapping[str, str]
    """What is added to this process's environment: the store's settings and secrets."""
    log_dir: Path
    """Where the workers' logs go."""
    module: str = "reverie_trainer.worker"
    """Python module that is the worker."""
    num_standby: int = 1
    """Workers that are kept warm: started, everything imported, waiting for a job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Standby:
    """A worker that waits for a job."""

    child: subprocess.Popen[bytes]
    log: Path

    def hand_over(self, line: str) -> bool:
        """Give it its job; False when it is gone."""
        if self.child.poll() is not None or self.child.stdin is None:
            _close_input(self.child)
            return False
        try:
            self.child.stdin.write(line.encode())
            self.child.stdin.flush()
        except BrokenPipeError:
            return False
        finally:
            _close_input(self.child)
        return True


class LocalLauncher:
    """Workers as processes of this machine, each in a session of its own so that it survives the trainer."""

    def __init__(self, command: WorkerCommand) -> None:
        self._command = command
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._standby: deque[_Standby] = deque()
        self._num_standby_started = 0
        self._num_standby_deaths = 0
        self._warm_up_at = 0.0
        command.log_dir.mkdir(parents=True, exist_ok=True)

    def start(self, job_id: str, token: str, number: int) -> dict[str, str]:
        """Start a worker, the warm one if there is one."""
        log = self._command.log_dir / f"{job_id}.{number}.log"
        child = self._take_standby(job_id, token, log)
        if child is None:
            child = self._spawn(["--job-id", job_id], log, {TOKEN_VARIABLE: token})
        self._children[child.pid] = child
        logger.info("worker started", extra={"job_id": job_id, "worker_pid": child.pid, "log": str(log)})
        return {"pid": str(child.pid), "start_ticks": _start_ticks(child.pid) or "", "log": str(log)}

    def is_alive(self, process: Mapping[str, str]) -> bool:
        """Whether a worker still runs."""
        pid = int(process["pid"])
        child = self._children.get(pid)
        if child is not None:
            if child.poll() is None:
                return True
            del self._children[pid]
            return False
        # Started by an earlier trainer: not our child any more, and the number may belong to another process by now.
        ticks = _start_ticks(pid)
        return ticks is not None and ticks == process["start_ticks"]

    def stop(self, process: Mapping[str, str]) -> None:
        """Ask a worker to save and to exit."""
        self._signal(process, signal.SIGTERM)

    def kill(self, process: Mapping[str, str]) -> None:
        """End a worker now, with everything in its session."""
        self._signal(process, signal.SIGKILL)

    def last_lines(self, process: Mapping[str, str]) -> list[str]:
        """Return the end of a worker's log."""
        try:
            text = Path(process["log"]).read_text(errors="replace")
        except OSError as error:
            return [f"its log cannot be read: {error}"]
        return text.splitlines()[-_LAST_LINES:]

    def warm_up(self) -> None:
        """Start workers until the wanted number waits."""
        self._children = {pid: child for pid, child in self._children.items() if child.poll() is None}
        self._drop_dead_standby()
        while len(self._standby) < self._command.num_standby and time.monotonic() >= self._warm_up_at:
            self._num_standby_started += 1
            log = self._command.log_dir / f"standby.{os.getpid()}.{self._num_standby_started}.log"
            child = self._spawn(["--standby"], log, {}, stdin=subprocess.PIPE)
            self._standby.append(_Standby(child=child, log=log))

    def close(self) -> None:
        """End the workers that wait; the end of their input tells them to exit. Blocks until they have."""
        for waiting in self._standby:
            # It may still be importing and would not see the end of its input for a while; it has nothing to lose.
            waiting.child.kill()
            _close_input(waiting.child)
        for child in [waiting.child for waiting in self._standby] + list(self._children.values()):
            _reap(child)
        self._standby.clear()
        self._children.clear()

    def _drop_dead_standby(self) -> None:
        """Forget waiting workers that died; one that cannot even start must not be started again and again."""
        for waiting in [item for item in self._standby if item.child.poll() is not None]:
            self._standby.remove(waiting)
            _close_input(waiting.child)
            self._num_standby_deaths += 1
            self._warm_up_at = time.monotonic() + min(2.0**self._num_standby_deaths, _LONGEST_PAUSE_SECONDS)
            logger.warning("a worker died while it waited for a job", extra={"log": str(waiting.log)})

    def _take_standby(self, job_id: str, token: str, log: Path) -> subprocess.Popen[bytes] | None:
        while self._standby:
            waiting = self._standby.popleft()
            if waiting.hand_over(f"{job_id} {token}\n"):
                # The worker goes on writing to its open file under the new name.
                waiting.log.replace(log)
                self._num_standby_deaths = 0
                return waiting.child
        return None

    def _spawn(
        self, arguments: Sequence[str], log: Path, secrets: Mapping[str, str], stdin: int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", self._command.module, *arguments, *self._command.arguments],
                stdin=stdin,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**child_environment(os.environ), **self._command.environment, **secrets},
            )

    def _signal(self, process: Mapping[str, str], number: signal.Signals) -> None:
        if not self.is_alive(process):
            return
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(int(process["pid"]), number)
            else:
                os.kill(int(process["pid"]), number)


def _close_input(child: subprocess.Popen[bytes]) -> None:
    if child.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()


def _reap(child: subprocess.Popen[bytes]) -> None:
    try:
        child.wait(timeout=_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _start_ticks(pid: int) -> str | None:
    """Return when a process began, in clock ticks since boot: with its number it names it for good.

    None when there is no such process, or only what is left of one that nobody waited for.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field, the name, may hold spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]
