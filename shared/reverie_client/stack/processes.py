"""Processes of this machine as /proc shows them: who is who, who lives, who belongs to which stack."""

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
POLL_SECONDS = 0.05
STACK_VARIABLE = "REVERIE_STACK"
"""Environment variable that marks every process of a stack, and what they start, with the state directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessIdentity:
    """One process. The number alone may belong to another process later; with the start time it does not."""

    pid: int
    start_ticks: int

    @property
    def is_alive(self) -> bool:
        """Whether this very process runs; a zombie does not."""
        found = _read_stat(self.pid)
        return found is not None and found == ("alive", self.start_ticks)

    @property
    def memory_bytes(self) -> int:
        """Resident memory, 0 for a process that is gone."""
        try:
            status = (PROC / str(self.pid) / "status").read_text()
        except OSError:
            return 0
        lines = [line for line in status.splitlines() if line.startswith("VmRSS:")]
        return int(lines[0].split()[1]) * 1024 if lines and self.is_alive else 0

    @property
    def uptime_seconds(self) -> float:
        """Seconds since the process began."""
        now = float((PROC / "uptime").read_text().split()[0])
        return max(0.0, now - self.start_ticks / os.sysconf("SC_CLK_TCK"))

    def send(self, number: signal.Signals) -> None:
        """Send a signal; one to a process that is gone is no error."""
        if not self.is_alive:
            return
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return


def identify(pid: int) -> ProcessIdentity:
    """Return the identity of a process that runs now. Raises ProcessLookupError."""
    found = _read_stat(pid)
    if found is None:
        raise ProcessLookupError(f"process {pid} is gone")
    return ProcessIdentity(pid=pid, start_ticks=found[1])


def wait_until_gone(processes: Iterable[ProcessIdentity], timeout_seconds: float) -> list[ProcessIdentity]:
    """Wait for processes to end; returns those that still run when the time is over."""
    deadline = time.monotonic() + timeout_seconds
    left = [process for process in processes if process.is_alive]
    while left and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        left = [process for process in left if process.is_alive]
    return left


def end(processes: Iterable[ProcessIdentity], grace_seconds: float) -> None:
    """Ask processes to end, all at once, and kill those that do not within `grace_seconds`."""
    asked = list(processes)
    for process in asked:
        process.send(signal.SIGTERM)
    left = wait_until_gone(asked, grace_seconds)
    for process in left:
        process.send(signal.SIGKILL)
    wait_until_gone(left, grace_seconds)


def processes_of_stack(state_dir: Path) -> list[ProcessIdentity]:
    """Find every process that a stack started, directly or not: workers run in sessions of their own."""
    mark = f"{STACK_VARIABLE}={state_dir}".encode()
    return [found for entry in PROC.iterdir() if entry.name.isdigit() and (found := _if_marked(entry, mark))]


def _if_marked(entry: Path, mark: bytes) -> ProcessIdentity | None:
    try:
        if mark not in (entry / "environ").read_bytes().split(b"\0"):
            return None
        found = identify(int(entry.name))
    except OSError:  # gone meanwhile, or of another user
        return None
    return found if found.is_alive and found.pid != os.getpid() else None


def _read_stat(pid: int) -> tuple[str, int] | None:
    """Return ("alive" or "dead", start time in clock ticks), or None when there is no such process."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The second field is the program's name in brackets, which may hold blanks and brackets.
    fields = stat.rpartition(")")[2].split()
    return ("dead" if fields[0] in "ZX" else "alive", int(fields[19]))
