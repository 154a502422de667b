"""A trainer that is killed and started again goes on with every job where it was."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from reverie.training.v1 import job_pb2
from reverie_common.storage.seaweed import Seaweed

CATS = [("512x512 a", ["a cat"]), ("640x448 b", ["a red cat"])]

StartProcess = Callable[[], Awaitable[tuple[subprocess.Popen[bytes], Any]]]


@pytest.fixture
async def start_process(
    trainer_flags: dict[str, Any],
    seaweed: Seaweed,
    connect_trainer: Any,
    worker_path: None,
    free_port: Callable[[], int],
    tmp_path: Path,
) -> AsyncIterator[StartProcess]:
    """Starts the trainer as a process of its own, again and again on the same port and state."""
    port = str(free_port())
    started: list[subprocess.Popen[bytes]] = []
    ready_file = tmp_path / "ready.json"

    async def start() -> tuple[subprocess.Popen[bytes], Any]:
        ready_file.unlink(missing_ok=True)
        environment = {**os.environ, **seaweed.environment, "REVERIE_STORE_BUCKET": trainer_flags["store_bucket"]}
        with (tmp_path / "trainer.log").open("ab") as log:
            command = [sys.executable, "-m", "reverie_trainer", *flags()]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)  # noqa: ASYNC220 - at once
        started.append(process)
        async with asyncio.timeout(30):
            while not ready_file.is_file():  # noqa: ASYNC110 - what is waited for is in another process
                await asyncio.sleep(0.02)
        return process, await connect_trainer(f"127.0.0.1:{json.loads(ready_file.read_text())['port']}")

    def flags() -> list[str]:
        values = {
            "port": port,
            "ready-file": str(ready_file),
            **{name.replace("_", "-"): trainer_flags[name] for name in FLAGS},
            "encoders": ",".join(trainer_flags["encoders"]),
        }
        return [part for name, value in values.items() for part in (f"--{name}", str(value))]

    yield start
    for process in started:
        process.kill()
        process.wait()
    for orphan in psutil.process_iter(["cmdline"]):
        if any(str(tmp_path) in part for part in orphan.info["cmdline"] or ()):
            orphan.kill()


FLAGS = (
    "metrics_port",
    "grace_seconds",
    "checkpoint",
    "state_dir",
    "vae",
    "worker_module",
    "standby_workers",
    "tick_seconds",
    "worker_stop_seconds",
)


async def test_killed_trainer_adopts_its_worker(start_process: StartProcess, make_spec: Any, worker_pids: Any) -> None:
    process, trainer = await start_process()
    await trainer.add_dataset("adopt", CATS)
    job = await trainer.submit(make_spec("adopt", "steps=12", "slow=0.2"))
    await trainer.until(job.job_id, lambda job: job.step >= 2)
    worker = worker_pids(job.job_id)
    process.kill()
    process.wait()
    assert worker_pids(job.job_id) == worker
    _, trainer = await start_process()
    final = await trainer.finish(job.job_id)
    assert (final.state, final.num_worker_starts) == (job_pb2.TRAINING_JOB_STATE_SUCCEEDED, 1)
    events = (await trainer.watch(job.job_id))[1:-1]
    assert [event.step.step for event in events if event.HasField("step")] == list(range(1, 13))
    assert [event.sequence for event in events] == list(range(1, final.last_sequence + 1))


async def test_worker_that_died_with_the_trainer_is_replaced(
    start_process: StartProcess, make_spec: Any, worker_pids: Any
) -> None:
    process, trainer = await start_process()
    await trainer.add_dataset("both", CATS)
    job = await trainer.submit(make_spec("both", "steps=8", "slow=0.2"))
    await trainer.until(job.job_id, lambda job: job.step >= 2)
    process.kill()
    process.wait()
    for pid in worker_pids(job.job_id):
        os.kill(pid, signal.SIGKILL)
    _, trainer = await start_process()
    final = await trainer.finish(job.job_id)
    assert (final.state, final.num_worker_starts) == (job_pb2.TRAINING_JOB_STATE_SUCCEEDED, 2)


async def test_preparation_goes_on_after_a_kill(start_process: StartProcess, make_spec: Any, neighbours: Any) -> None:
    process, trainer = await start_process()
    await trainer.add_dataset("prepare", CATS)
    neighbours.vae.may_answer.clear()
    job = await trainer.submit(make_spec("prepare"))
    await trainer.until(job.job_id, lambda job: job.state == job_pb2.TRAINING_JOB_STATE_PREPARING)
    process.kill()
    process.wait()
    neighbours.vae.may_answer.set()
    _, trainer = await start_process()
    assert (await trainer.finish(job.job_id)).state == job_pb2.TRAINING_JOB_STATE_SUCCEEDED


async def test_stopped_trainer_lets_workers_save_and_goes_on_later(
    start_process: StartProcess, make_spec: Any, worker_pids: Any
) -> None:
    process, trainer = await start_process()
    await trainer.add_dataset("stop", CATS)
    job = await trainer.submit(make_spec("stop", "steps=10", "slow=0.2"))
    await trainer.until(job.job_id, lambda job: job.step >= 2)
    process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(process.wait, 20) == 0
    assert worker_pids(job.job_id) == []
    _, trainer = await start_process()
    final = await trainer.finish(job.job_id)
    assert (final.state, final.num_worker_starts) == (job_pb2.TRAINING_JOB_STATE_SUCCEEDED, 2)
    events = await trainer.watch(job.job_id)
    assert [event.step.step for event in events if event.HasField("step")] == list(range(1, 11))
    assert [event.notice.reason for event in events if event.HasField("notice")] == ["WORKER_STOPPED"]


async def test_missing_checkpoint_part_is_told_at_start(
    trainer_flags: dict[str, Any], seaweed: Seaweed, tmp_path: Path
) -> None:
    environment = {**os.environ, **seaweed.environment}
    command = [
        sys.executable,
        "-m",
        "reverie_trainer",
        "--checkpoint",
        str(tmp_path),
        "--port",
        "0",
        "--metrics-port",
        "0",
    ]
    process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=asyncio.subprocess.PIPE)
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert b"has no transformer/config.json" in errors
    assert b"Traceback" not in errors
