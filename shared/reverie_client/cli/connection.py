"""Which services a command talks to, and how it runs the SDK."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from reverie_client.calls import CallPolicy
from reverie_client.client import DEFAULT_ADDRESS, Reverie
from reverie_client.stack.options import default_state_dir
from reverie_client.stack.state import StateDirectory

Result = TypeVar("Result")

DEFAULT_SAMPLER = "127.0.0.1:50054"
RETRY_SECONDS = 3.0
"""A person who waits wants to hear soon that nothing answers; jobs are followed with more patience."""

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar="REVERIE_ADDRESS",
        help="The trainer, HOST:PORT. Default: that of the stack which `reverie up` started, else 127.0.0.1:50053.",
        show_default=False,
    ),
]
SamplerAddress = Annotated[
    str | None,
    typer.Option(
        "--sampler",
        envvar="REVERIE_SAMPLER_ADDRESS",
        help="The sampler, HOST:PORT. Default: that of the stack which `reverie up` started, else 127.0.0.1:50054.",
        show_default=False,
    ),
]
StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        envvar="REVERIE_STATE_DIR",
        help="What the stack keeps: objects, jobs, logs. Default: reverie/ below XDG_STATE_HOME or ~/.local/state.",
        show_default=False,
    ),
]


def connect(
    address: str | None,
    state_dir: Path | None = None,
    *,
    sampler: str | None = None,
    retry_seconds: float = RETRY_SECONDS,
) -> Reverie:
    """Return the SDK for the services that were named, or that run here. Call it inside an event loop."""
    return Reverie(
        address or local_address("trainer", state_dir) or DEFAULT_ADDRESS,
        sampler=sampler or local_address("sampler", state_dir) or DEFAULT_SAMPLER,
        policy=CallPolicy(retry_seconds=retry_seconds),
    )


def local_address(service: str, state_dir: Path | None) -> str | None:
    """Return where a service of this machine's stack listens, or None when it does not run."""
    record = StateDirectory(path=state_dir or default_state_dir()).load().get(service)
    return record.address if record is not None and record.process.is_alive else None


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Run a command's coroutine."""
    return asyncio.run(main)
