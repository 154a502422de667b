"""`python -m reverie_trainer.worker` as a process: killed, stopped, kept in waiting, started wrongly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from reverie.common.v1.common_pb2 import ObjectRef
from reverie.training.v1.training_pb2 import WORKER_OUTCOME_STOPPED, WORKER_OUTCOME_SUCCEEDED
from reverie_common.storage.keys import checkpoint_manifest_key
from reverie_common.storage.seaweed import Seaweed

Start = Callable[..., "subprocess.Popen[str]"]

# Long enough that a signal finds the worker at work, short enough for a test.
LONG = {"optimization": {"max_steps": 24}, "checkpoints": {"every_steps": 4}}


@pytest.fixture
def start(prepared: Any, seaweed: Seaweed) -> Iterator[Start]:
    """Start worker processes; they end with the test at the latest."""
    processes: list[subprocess.Popen[str]] = []
    environment = {**os.environ, **seaweed.environment, "REVERIE_STORE_BUCKET": prepared.store.bucket}

    def begin(trainer_address: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "reverie_trainer.worker", f"--trainer={trainer_address}", "--device=cpu"]
        command += [f"--checkpoint={prepared.checkpoint}", "--num-threads=1", "--report-interval-seconds=0.05"]
        process = subprocess.Popen(
            [*command, *arguments],
            env={**environment, **variables},
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def test_a_killed_worker_and_its_successor_end_in_the_same_bytes(
    prepared: Any, serve_trainer: Any, start: Start
) -> None:
    straight, killed = (prepared.trainer(name=name, **LONG) for name in ("job-through", "job-killed"))
    killed.job.spec.name = straight.job.spec.name
    with serve_trainer(straight) as address:
        assert _end_of(start(address, "--job-id=job-through", REVERIE_WORKER_TOKEN="secret")) == 0
    with serve_trainer(killed) as address:
        victim = start(address, "--job-id=job-killed", REVERIE_WORKER_TOKEN="secret")
        _wait_until(lambda: any(figures.step >= 10 for figures in killed.of_kind("step")), victim)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        newest = killed.of_kind("checkpoint")[-1].step
        killed.checkpoint = ObjectRef(uri=prepared.store.uri(checkpoint_manifest_key("job-killed", newest)))
        assert _end_of(start(address, "--job-id=job-killed", REVERIE_WORKER_TOKEN="secret")) == 0
    assert 4 <= newest < 24
    assert killed.completions[0].outcome == WORKER_OUTCOME_SUCCEEDED
    assert killed.completions[0].adapter.sha256 == straight.completions[0].adapter.sha256
    assert killed.losses() == straight.losses()


def test_sigterm_saves_and_says_so(prepared: Any, serve_trainer: Any, start: Start) -> None:
    trainer = prepared.trainer(name="job-told", optimization={"max_steps": 1000}, checkpoints={"every_steps": 0})
    with serve_trainer(trainer) as address:
        process = start(address, "--job-id=job-told", REVERIE_WORKER_TOKEN="secret")
        _wait_until(lambda: any(figures.step >= 2 for figures in trainer.of_kind("step")), process)
        process.send_signal(signal.SIGTERM)
        assert _end_of(process) == 0
    assert trainer.completions[0].outcome == WORKER_OUTCOME_STOPPED
    assert trainer.of_kind("checkpoint")[-1].step == trainer.of_kind("step")[-1].step


def test_a_waiting_worker_takes_the_job_that_it_is_told(prepared: Any, serve_trainer: Any, start: Start) -> None:
    trainer = prepared.trainer(name="job-waited")
    with serve_trainer(trainer) as address:
        process = start(address, "--standby")
        _, log = process.communicate("job-waited secret-of-the-line\n", timeout=60)
    assert process.returncode == 0, log
    assert (trainer.leases[0].job_id, trainer.leases[0].worker_token) == ("job-waited", "secret-of-the-line")
    assert trainer.completions[0].outcome == WORKER_OUTCOME_SUCCEEDED
    assert "secret-of-the-line" not in log
    assert all(json.loads(line)["service"] == "worker" for line in log.splitlines())


def test_a_waiting_worker_without_a_job_ends_well(start: Start) -> None:
    process = start("127.0.0.1:1", "--standby")
    _, log = process.communicate("", timeout=60)
    assert process.returncode == 0, log


def test_a_waiting_worker_ends_on_sigterm(start: Start) -> None:
    process = start("127.0.0.1:1", "--standby")
    assert process.stderr is not None
    assert "ready and waiting" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert _end_of(process) == 0


@pytest.mark.parametrize(
    ("arguments", "told"), [((), "job_id is missing"), (("--job-id=x", "--token=y"), "REVERIE_WORKER_TOKEN")]
)
def test_a_worker_that_was_started_wrongly_says_how(start: Start, arguments: tuple[str, ...], told: str) -> None:
    process = start("127.0.0.1:1", *arguments)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 2
    assert told in log
    assert "Traceback" not in log


def _wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _end_of(process: subprocess.Popen[str]) -> int:
    _, log = process.communicate(timeout=60)
    assert "Traceback" not in log, log
    return process.returncode
