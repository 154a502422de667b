"""`reverie up` with every service, as a person runs it."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reverie_client.stack import Stack, StackOptions
from reverie_client.stack.processes import processes_of_stack
from reverie_client.stack.state import StateDirectory
from reverie_common.errors import FailedPreconditionError, UnavailableError

REVERIE = [str(Path(sys.executable).with_name("reverie"))]


def reverie(*arguments: str, state_dir: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*REVERIE, *arguments, "--state-dir", str(state_dir)], capture_output=True, text=True, timeout=240, check=False
    )


def remaining(state_dir: Path) -> list[Any]:
    """Return what still runs of a stack: services by their mark, the store by the record."""
    alive = [record for record in StateDirectory(path=state_dir).load().values() if record.process.is_alive]
    return [*processes_of_stack(state_dir), *alive]


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "state"
    yield path
    reverie("down", state_dir=path)


def test_a_port_in_use_is_named_with_the_flag_that_changes_it(state_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        options = StackOptions(state_dir=state_dir, ports={"vae": port}, metrics_ports={})
        with pytest.raises(FailedPreconditionError, match=rf"127\.0\.0\.1:{port} .*--vae-port"):
            Stack(options).start()
    assert remaining(state_dir) == []


def test_a_service_that_dies_at_the_start_is_named_and_everything_is_stopped(
    state_dir: Path, tiny_checkpoint: Path
) -> None:
    options = StackOptions(
        state_dir=state_dir, checkpoint=str(tiny_checkpoint), flags={"trainer": ("--no-such-flag",)}
    ).with_ephemeral_ports()
    stack = Stack(options)
    with pytest.raises(UnavailableError, match=r"trainer ended \(exit code 2\)(.|\n)*no-such-flag"):
        stack.start()
    assert stack.store.is_running is False
    assert remaining(state_dir) == []


@pytest.mark.slow
def test_detached_stack_is_up_until_it_is_taken_down(state_dir: Path, tiny_checkpoint: Path) -> None:
    checkpoint = ("--checkpoint", str(tiny_checkpoint))
    up = reverie("up", "--detach", "--ephemeral-ports", *checkpoint, "-o", "json", state_dir=state_dir)
    assert up.returncode == 0, up.stderr
    status = reverie("status", "-o", "json", state_dir=state_dir)
    services = {service["name"]: service for service in json.loads(status.stdout)["services"]}
    assert {service["health"] for service in services.values()} == {"serving"}
    assert {name: service["address"] for name, service in services.items()} == json.loads(up.stdout)["addresses"]
    assert all(service["memory_bytes"] > 10e6 for service in services.values())

    second = reverie("up", "--ephemeral-ports", *checkpoint, state_dir=state_dir)
    assert second.returncode == 5
    assert "reverie down" in second.stderr

    os.kill(services["vae"]["pid"], signal.SIGKILL)
    after = json.loads(reverie("status", "-o", "json", state_dir=state_dir).stdout)["services"]
    assert {service["name"]: service["health"] for service in after}["vae"] == "dead"

    down = reverie("down", "-o", "json", state_dir=state_dir)
    assert json.loads(down.stdout)["stopped"] == ["trainer", "sampler", "encoder", "store"]
    assert remaining(state_dir) == []


@pytest.mark.slow
def test_stack_in_the_foreground_reports_a_dead_service_and_stops_the_rest(
    state_dir: Path, tiny_checkpoint: Path
) -> None:
    command = [*REVERIE, "up", "--ephemeral-ports", "--checkpoint", str(tiny_checkpoint), "--state-dir", str(state_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        assert up.stdout.readline().startswith("up: store 127.0.0.1:")
        os.kill(StateDirectory(path=state_dir).load()["encoder"].pid, signal.SIGKILL)
        _, errors = up.communicate(timeout=120)
    assert up.returncode == 1
    assert "encoder ended (signal SIGKILL)" in errors
    assert "serving on" in errors
    assert remaining(state_dir) == []
