"""`reverie up`, `down` and `status`."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from reverie_client.cli.connection import StateDir
from reverie_client.cli.console import (
    EXIT_FAILED,
    Output,
    OutputFormat,
    print_json,
    print_table,
    stderr,
    stdout,
)
from reverie_client.cli.progress import readable_bytes
from reverie_client.stack.options import DEFAULT_PORTS, SERVICES, StackOptions, default_state_dir, service_flags
from reverie_client.stack.state import StateDirectory
from reverie_client.stack.status import read_status

COLOURS = {
    "store": "magenta",
    "encoder": "cyan",
    "vae": "blue",
    "sampler": "yellow",
    "trainer": "green",
    "worker": "bright_green",
}
LEVEL_STYLES = {"warning": "yellow", "error": "bold red", "critical": "bold red"}
POLL_SECONDS = 0.2

Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any free one.")]


def up(
    state_dir: StateDir = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="The model: a directory, an s3:// prefix or a Hub id. Default: a tiny checkpoint, made at first use.",
            show_default=False,
        ),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Come back once everything serves.")] = False,
    ephemeral_ports: Annotated[bool, typer.Option("--ephemeral-ports", help="Use free ports throughout.")] = False,
    trainer_port: Port = DEFAULT_PORTS["trainer"],
    encoder_port: Port = DEFAULT_PORTS["encoder"],
    vae_port: Port = DEFAULT_PORTS["vae"],
    sampler_port: Port = DEFAULT_PORTS["sampler"],
    store_port: Port = DEFAULT_PORTS["store"],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="SERVICE.SETTING=VALUE, for instance sampler.clip-model=DIRECTORY; may be repeated.",
            show_default=False,
        ),
    ] = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Start an S3 server and the four services on this machine, on loopback.

    In the foreground it shows one log and stops everything, in order, on Ctrl-C.

    Examples: [bold]reverie up[/], [bold]reverie up --detach --checkpoint ~/models/HiDream-I1-Full[/]
    """
    from reverie_client.stack.stack import Stack

    options = StackOptions(
        state_dir=state_dir or default_state_dir(),
        checkpoint=checkpoint,
        ports={
            "trainer": trainer_port,
            "encoder": encoder_port,
            "vae": vae_port,
            "sampler": sampler_port,
            "store": store_port,
        },
        flags=service_flags(settings or ()),
    )
    console = stderr()
    stack = Stack(
        options.with_ephemeral_ports() if ephemeral_ports else options,
        on_step=lambda name, what: console.print(f"{_coloured(name)} {what}"),
    )
    with _stop_signals() as stop:
        stack.start()
        _print_addresses(stack.addresses, options.state_dir, output)
        if detach:
            return
        exit_code = _run_until(stop, stack, console)
    if exit_code:
        raise typer.Exit(exit_code)


def down(state_dir: StateDir = None, output: Output = OutputFormat.TEXT) -> None:
    """Stop a stack, in order; jobs that were at work go on when it is up again."""
    from reverie_client.stack.stack import stop_recorded

    state = StateDirectory(path=(state_dir or default_state_dir()).absolute())
    console = stderr()
    stopped: list[str] = []
    if state.path.is_dir():
        with state.locked():
            stopped = stop_recorded(state, on_step=lambda name, what: console.print(f"{_coloured(name)} {what}"))
    if output is OutputFormat.JSON:
        print_json({"stopped": stopped})
    elif not stopped:
        stdout().print(f"nothing runs in {state.path}", markup=False)


def status(state_dir: StateDir = None, output: Output = OutputFormat.TEXT) -> None:
    """Show the stack's services. Exit code 1 unless all of them serve."""
    path = state_dir or default_state_dir()
    services = read_status(path)
    if output is OutputFormat.JSON:
        print_json({"state_dir": str(path), "services": [service.as_dict() for service in services]})
    else:
        rows = [
            (
                service.name,
                service.health,
                service.pid or "-",
                service.address or "-",
                f":{service.metrics_port}/metrics" if service.metrics_port else "-",
                timedelta(seconds=round(service.uptime_seconds)) if service.uptime_seconds is not None else "-",
                readable_bytes(service.memory_bytes) if service.memory_bytes else "-",
            )
            for service in services
        ]
        print_table(("service", "health", "pid", "address", "metrics", "uptime", "memory"), rows)
    if any(service.health != "serving" for service in services):
        raise typer.Exit(EXIT_FAILED)


def _print_addresses(addresses: dict[str, str], state_dir: Path, output: OutputFormat) -> None:
    if output is OutputFormat.JSON:
        print_json({"state_dir": str(state_dir), "addresses": addresses})
        return
    listed = "  ".join(f"{name} {addresses[name]}" for name in SERVICES)
    stdout().print(f"up: {listed}", markup=False)


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Turn SIGTERM into the KeyboardInterrupt that Ctrl-C is, so that both stop what was started."""
    stop = threading.Event()

    def interrupt(_: int, __: Any) -> None:
        stop.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_until(stop: threading.Event, stack: Any, console: Console) -> int:
    """Show the logs until Ctrl-C or until a service dies; then stop everything. Returns the exit code."""
    logs = _Logs(stack.state, console)
    exit_code = 0
    try:
        while not stop.is_set():
            logs.show_news()
            dead = stack.dead()
            if dead:
                console.print("\n".join(f"[bold red]error[/] {escape(each.describe())}" for each in dead))
                exit_code = EXIT_FAILED
                break
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        console.print("stopping; Ctrl-C again stops at once")
    try:
        stack.stop()
    except KeyboardInterrupt:
        stack.stop(grace_seconds=0.0)
    logs.show_news()
    logs.close()
    return exit_code


class _Logs:
    """The logs of all services and workers as one, coloured by their origin."""

    def __init__(self, state: StateDirectory, console: Console) -> None:
        self._workers = state.service_dir("trainer") / "workers"
        self._console = console
        self._files: list[tuple[str, IO[bytes]]] = [(name, state.log(name).open("rb")) for name in SERVICES]
        # A worker's log is renamed when it gets its job; its inode stays.
        self._known = {path.stat().st_ino for path in self._workers.glob("*.log")}

    def show_news(self) -> None:
        """Print the lines since the last time."""
        for path in sorted(self._workers.glob("*.log")):
            self._open_worker(path)
        for name, file in self._files:
            for line in file:
                text = _readable(line.decode("utf-8", "replace").rstrip())
                self._console.print(f"{_coloured(name)} {text}", soft_wrap=True)

    def close(self) -> None:
        """Close the files."""
        for _, file in self._files:
            file.close()

    def _open_worker(self, path: Path) -> None:
        try:
            inode = path.stat().st_ino
            if inode not in self._known:
                self._files.append(("worker", path.open("rb")))
                self._known.add(inode)
        except FileNotFoundError:  # renamed meanwhile; the next round finds it
            return


def _readable(line: str) -> str:
    """Turn one JSON log line into words; other lines stay as they are."""
    try:
        entry = json.loads(line)
    except ValueError:
        return escape(line)
    if not isinstance(entry, dict):
        return escape(line)
    level = str(entry.get("level", entry.get("severity", "info"))).lower()
    message = escape(str(entry.get("message", entry.get("event", line))))
    style = LEVEL_STYLES.get(level)
    return f"[{style}]{message}[/]" if style else message


def _coloured(name: str) -> str:
    return f"[{COLOURS.get(name, 'white')}]{name:<10}[/]"
