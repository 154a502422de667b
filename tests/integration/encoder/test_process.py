"""`python -m reverie_encoder` as a process: it starts, serves, drains, and says in one line why it cannot."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from reverie.encoder.v1 import encoder_pb2
from reverie.encoder.v1.encoder_pb2_grpc import EncoderServiceStub
from reverie_common.rpc.channel import connect

METRICS = (
    'reverie_encoder_queue_depth{encoder="t5"} 0.0',
    'reverie_encoder_batch_size_count{encoder="t5"} 1.0',
    'reverie_encoder_embeddings_total{encoder="t5",source="computed"} 1.0',
    'reverie_encoder_model_load_seconds{encoder="clip_l"}',
)

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(store_environment: dict[str, str]) -> Start:
    """Starts an encoder process on the test's bucket; it ends with the test at the latest."""

    def begin(*arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "reverie_encoder", "--port=0", "--metrics-port=0", *arguments]
        return subprocess.Popen(command, env={**os.environ, **store_environment}, stderr=subprocess.PIPE, text=True)

    return begin


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    """Wait until a file is there; fail when the process ends first, or after a minute."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def read_metrics(port: int) -> str:
    """The process's metrics as Prometheus sees them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        text: str = page.read().decode()
    return text


async def test_serves_until_sigterm_and_ends_with_status_0(start: Start, tiny_checkpoint: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    process = start(f"--checkpoint={tiny_checkpoint}", "--encoders=clip_l,t5", f"--ready-file={ready}")
    try:
        wait_for(ready, process)
        ports = json.loads(ready.read_text())
        async with connect(f"127.0.0.1:{ports['port']}") as channel:
            request = encoder_pb2.EncodePromptsRequest(prompts=["from another process"])
            answers = [answer async for answer in EncoderServiceStub(channel).EncodePrompts(request)]
        metrics = await asyncio.to_thread(read_metrics, ports["metrics_port"])
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert ports["pid"] == process.pid
    assert len(answers[0].embeddings) == 2
    for sample in METRICS:
        assert f"\n{sample}" in metrics
    assert process.returncode == 0
    assert "Traceback" not in log
    assert all(json.loads(line)["service"] == "encoder" for line in log.splitlines())


def test_a_missing_part_is_one_line_and_status_1(start: Start, tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint, ignore=shutil.ignore_patterns("text_encoder_3"))
    process = start(f"--checkpoint={checkpoint}", "--encoders=clip_l,t5")
    _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    errors = [line for line in map(json.loads, log.splitlines()) if line["level"] == "error"]
    assert len(errors) == 1
    assert "text_encoder_3" in errors[0]["message"]
    assert errors[0]["reason"] == "CHECKPOINT_PART_MISSING"


def test_wrong_settings_are_one_line_and_status_1(start: Start) -> None:
    process = start("--encoders=clip_l,clip_x", "--checkpoint=/nowhere", "--precision=t5=int3")
    _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(log.splitlines()) == 1
    assert "clip_x" in log
    assert "--precision" in log
