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
LONG = {"optimization": {"max_steps": 16}, "checkpoints": {"every_steps": 2}}


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


def test_a_job_whose_workers_were_killed_and_stopped_ends_in_the_same_bytes(
    prepared: Any, serve_trainer: Any, start: Start
) -> None:
    straight, broken = (prepared.trainer(name=name, **LONG) for name in ("job-through", "job-broken"))
    broken.job.spec.name = straight.job.spec.name
    with serve_trainer(straight) as address:
        waiting = start(address, "--standby")
        assert "secret-of-the-line" not in _end_of(waiting, "job-through secret-of-the-line\n")
    assert (straight.leases[0].job_id, straight.leases[0].worker_token) == ("job-through", "secret-of-the-line")
    with serve_trainer(broken) as address:
        killed = start(address, "--job-id=job-broken", REVERIE_WORKER_TOKEN="secret")
        _wait_until(lambda: _newest_checkpoint(broken) >= 4, killed)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        _resume(prepared, broken)
        told = start(address, "--job-id=job-broken", REVERIE_WORKER_TOKEN="secret")
        _wait_until(lambda: len(broken.of_kind("checkpoint")) > 4, told)
        told.send_signal(signal.SIGTERM)
        _end_of(told)
        _resume(prepared, broken)
        _end_of(start(address, "--job-id=job-broken", REVERIE_WORKER_TOKEN="secret"))
    stopped, completed = broken.completions
    assert stopped.outcome == WORKER_OUTCOME_STOPPED
    assert completed.outcome == WORKER_OUTCOME_SUCCEEDED
    assert completed.adapter.sha256 == straight.completions[0].adapter.sha256
    assert broken.losses() == straight.losses()


def test_a_waiting_worker_without_a_job_ends_well(start: Start) -> None:
    process = start("127.0.0.1:1", "--standby")
    _, log = process.communicate("", timeout=60)
    assert process.returncode == 0, log


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


def _newest_checkpoint(trainer: Any) -> int:
    return max((checkpoint.step for checkpoint in trainer.of_kind("checkpoint")), default=0)


def _resume(prepared: Any, trainer: Any) -> None:
    """Let the next lease name the newest checkpoint, as the trainer does."""
    key = checkpoint_manifest_key(trainer.job.job_id, _newest_checkpoint(trainer))
    trainer.checkpoint = ObjectRef(uri=prepared.store.uri(key))


def _end_of(process: subprocess.Popen[str], line: str = "") -> str:
    """Wait for the end, which must be a good one; returns the log, which must be one JSON object a line."""
    _, log = process.communicate(line, timeout=90)
    assert process.returncode == 0, log
    assert all(json.loads(line)["service"] == "worker" for line in log.splitlines())
    assert "Traceback" not in log
    return log
