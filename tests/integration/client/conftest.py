"""A trainer process for the client to talk to, and an HTTP server that misbehaves as stores and networks do."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from reverie_client import CallPolicy, SyncReverie
from reverie_common.storage.seaweed import Seaweed

READY_SECONDS = 60.0
SOURCE_BUCKET = "client-test-photos"
"""A bucket that the trainer may import from."""


@dataclass(kw_only=True)
class TrainerProcess:
    """A trainer in a process of its own, which may be killed and started again at the same address."""

    address: str
    command: list[str]
    environment: dict[str, str]
    ready_file: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it serves."""
        self.ready_file.unlink(missing_ok=True)
        self.process = subprocess.Popen(self.command, env=self.environment, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + READY_SECONDS
        while not self.ready_file.exists():
            assert self.process.poll() is None, "the trainer ended"
            assert time.monotonic() < deadline, "the trainer was not ready in time"
            time.sleep(0.02)
        assert json.loads(self.ready_file.read_text())["pid"] == self.process.pid

    def kill(self) -> None:
        """End it at once."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it in order."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


@pytest.fixture(scope="module")
def trainer(
    seaweed: Seaweed,
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    free_port: Callable[[], int],
) -> Iterator[TrainerProcess]:
    """A trainer whose encoder and VAE are away, so that jobs stay where they are until they are cancelled."""
    directory = tmp_path_factory.mktemp("trainer")
    port, nobody = free_port(), f"127.0.0.1:{free_port()}"
    ready_file = directory / "ready.json"
    command = [sys.executable, "-m", "reverie_trainer", "--checkpoint", str(tiny_checkpoint), "--port", str(port)]
    command += ["--metrics-port", "0", "--ready-file", str(ready_file), "--state-dir", str(directory)]
    command += ["--encoders", nobody, "--vae", nobody, "--sampler", nobody, "--standby-workers", "0"]
    command += ["--grace-seconds", "1", "--source-buckets", SOURCE_BUCKET]
    running = TrainerProcess(
        address=f"127.0.0.1:{port}",
        command=command,
        environment={**os.environ, **seaweed.environment},
        ready_file=ready_file,
    )
    running.start()
    yield running
    running.stop()


@pytest.fixture
def reverie(trainer: TrainerProcess) -> Iterator[SyncReverie]:
    """The SDK, connected to the trainer."""
    with SyncReverie(trainer.address, policy=CallPolicy(retry_seconds=20.0)) as connected:
        yield connected


@dataclass(kw_only=True)
class FlakyServer:
    """Answers GET and PUT as it is told, one answer for each request, and then properly."""

    body: bytes = b""
    statuses: list[int] = field(default_factory=list)
    """Statuses of the next answers; then 200."""
    cut_after: list[int] = field(default_factory=list)
    """Of the next whole answers, how many bytes are sent before the connection breaks."""
    ranges: list[str | None] = field(default_factory=list)
    """The Range header of each request."""
    stored: bytes = b""
    """What was put."""
    url: str = ""


@pytest.fixture
def flaky() -> Iterator[FlakyServer]:
    """An HTTP server that misbehaves."""
    state = FlakyServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.ranges.append(self.headers["Range"])
            if state.statuses:
                self.send_error(state.statuses.pop(0))
                return
            begin = int((self.headers["Range"] or "bytes=0-")[6:-1])
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(state.body) - begin))
            self.end_headers()
            end = begin + state.cut_after.pop(0) if state.cut_after else len(state.body)
            self.wfile.write(state.body[begin:end])

        def do_PUT(self) -> None:
            received = self.rfile.read(int(self.headers["Content-Length"]))
            if state.statuses:
                self.send_error(state.statuses.pop(0))
                return
            state.stored = received
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/file?signature=x"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()
