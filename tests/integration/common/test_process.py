"""A service as a whole process: it becomes ready, drains on SIGTERM, and says in one line why it cannot start."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from reverie_common.errors import UnavailableError
from reverie_common.process import MALLOC_ENVIRONMENT, child_environment
from reverie_common.rpc.channel import connect, translated
from reverie_common.rpc.server import Server
from reverie_common.settings import ServerSettings

TIMEOUT_SECONDS = 60


class Process:
    """A running painter."""

    def __init__(self, program: Path, directory: Path, *flags: str) -> None:
        self.ready_file = directory / "run" / "ready.json"
        self.popen = subprocess.Popen(
            [sys.executable, str(program), "--ready-file", str(self.ready_file), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    async def ready(self) -> dict[str, int]:
        """Wait until it serves; gives its ports."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not self.ready_file.exists():
            assert self.popen.poll() is None, self.popen.communicate()[1]
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        ports: dict[str, int] = json.loads(self.ready_file.read_text())
        return ports

    async def ended(self) -> tuple[int, list[dict[str, Any]], str]:
        """Wait until it has ended; gives its status, its log lines and everything else that it wrote."""
        out, err = await asyncio.to_thread(self.popen.communicate, timeout=TIMEOUT_SECONDS)
        lines = err.splitlines()
        logged = [json.loads(line) for line in lines if line.startswith("{")]
        return self.popen.returncode, logged, out + "\n".join(line for line in lines if not line.startswith("{"))

    def close(self) -> None:
        """End it whatever it does."""
        self.popen.kill()
        self.popen.communicate()


@pytest.fixture
async def start(painter_program: Path, tmp_path: Path) -> AsyncIterator[Callable[..., Process]]:
    """Starts painters and ends them after the test."""
    with contextlib.ExitStack() as stack:

        def start_process(*flags: str) -> Process:
            process = Process(painter_program, tmp_path, *flags)
            stack.callback(process.close)
            return process

        yield start_process


async def ask(port: int, request: bytes) -> bytes:
    """Call a painter."""
    async with connect(f"127.0.0.1:{port}", retries=False) as channel:
        unary: Any = channel.unary_unary("/reverie.painter.v1.PainterService/Unary")
        with translated():
            answer: bytes = await unary(request, timeout=TIMEOUT_SECONDS)
        return answer


async def test_a_process_says_where_it_serves(start: Callable[..., Process]) -> None:
    process = start()
    ports = await process.ready()
    assert ports["pid"] == process.popen.pid
    assert ports["metrics_port"] != ports["port"]
    assert await ask(ports["port"], b"a") == b"a"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_ends_with_status_0(start: Callable[..., Process], number: signal.Signals) -> None:
    process = start()
    port = (await process.ready())["port"]
    in_flight = asyncio.create_task(ask(port, b"sleep:1"))
    await asyncio.sleep(0.3)
    process.popen.send_signal(number)
    assert await in_flight == b"sleep:1"
    status, logged, other = await process.ended()
    assert (status, other) == (0, "")
    messages = [line["message"] for line in logged]
    assert messages.index("draining") < messages.index("Unary OK") < messages.index("stopped")
    # The stop step ran: it changes the service's name in the log.
    assert logged[-1]["service"] == "painter-stopping"
    assert not process.ready_file.exists()


async def test_a_second_signal_ends_at_once(start: Callable[..., Process]) -> None:
    process = start("--drain-seconds", "600")
    await process.ready()
    process.popen.terminate()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while process.ready_file.exists():  # noqa: ASYNC110  # another process removes it
            await asyncio.sleep(0.02)
    process.popen.terminate()
    status, _, _ = await process.ended()
    assert status == 128 + signal.SIGTERM


async def test_a_signal_while_loading_ends_it(start: Callable[..., Process]) -> None:
    process = start("--load-seconds", "600")
    await asyncio.to_thread(process.popen.stderr.fileno)  # type: ignore[union-attr]  # a pipe
    await _listening(process)
    process.popen.terminate()
    status, _, other = await process.ended()
    assert (status, other) == (0, "")


async def _listening(process: Process) -> None:
    """Wait until a process that is still loading has begun to listen, which is after it handles signals."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not _ports_of(process.popen.pid):  # noqa: ASYNC110  # another process opens them
            await asyncio.sleep(0.02)


def _ports_of(pid: int) -> list[int]:
    import psutil

    connections = psutil.Process(pid).net_connections(kind="inet")
    ports = [connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN]
    return ports if len(ports) > 1 else []


async def test_loading_that_fails_is_one_line_and_status_1(start: Callable[..., Process], tmp_path: Path) -> None:
    status, logged, other = await start("--missing", str(tmp_path / "model.safetensors")).ended()
    (line,) = [line for line in logged if line["level"] == "error"]
    assert (status, other) == (1, "")
    assert line["message"].endswith("model.safetensors is missing: download it again")
    assert line["reason"] == "CHECKPOINT_PART_MISSING"
    assert "trace" not in line


async def test_a_bug_while_loading_keeps_its_trace(start: Callable[..., Process]) -> None:
    status, _, other = await start("--broken").ended()
    assert status == 1
    assert "KeyError: 'a bug while loading'" in other


async def test_a_port_in_use_is_one_line_and_status_1(start: Callable[..., Process], painter: Any) -> None:
    async with Server([painter.served(painter.Painter())], ServerSettings()) as server:
        status, logged, other = await start("--port", str(server.port)).ended()
    assert (status, other) == (1, "")
    assert [line["reason"] for line in logged if line["level"] == "error"] == ["PORT_IN_USE"]
    assert str(server.port) in logged[0]["message"]


async def test_wrong_settings_are_one_line_and_status_1(start: Callable[..., Process]) -> None:
    status, _, other = await start("--port", "-1", "--log-format", "loud").ended()
    assert status == 1
    assert "--port (REVERIE_PAINTER_PORT)" in other
    assert "--log-format (REVERIE_PAINTER_LOG_FORMAT)" in other
    assert "Traceback" not in other


async def test_a_killed_process_is_unavailable(start: Callable[..., Process]) -> None:
    process = start()
    port = (await process.ready())["port"]
    process.popen.kill()
    await process.ended()
    with pytest.raises(UnavailableError):
        await ask(port, b"a")


def test_the_malloc_environment_is_what_was_measured() -> None:
    assert MALLOC_ENVIRONMENT["MALLOC_ARENA_MAX"] == "1"
    assert all(name.startswith("MALLOC_") and value.isdigit() for name, value in MALLOC_ENVIRONMENT.items())


def test_torch_allocates_growing_segments_unless_told_otherwise() -> None:
    assert child_environment({"HOME": "/h"}) == {
        "HOME": "/h",
        **MALLOC_ENVIRONMENT,
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        own = {name: "max_split_size_mb:512"}
        assert child_environment(own) == {**own, **MALLOC_ENVIRONMENT}
