"""The sampler while others are away: nothing that was drawn is lost, and the process itself starts and ends well."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from reverie.sampling.v1 import sampling_pb2
from reverie.sampling.v1.sampling_pb2_grpc import SamplingServiceStub
from reverie_common.errors import FailedPreconditionError, ResourceExhaustedError, UnavailableError
from reverie_common.rpc.channel import connect, translated
from reverie_common.rpc.server import Server
from reverie_sampler.service import SamplerService
from reverie_sampler.settings import SamplerSettings
from reverie_vae.service import VaeService
from reverie_vae.settings import VaeSettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

Sample = Callable[..., Coroutine[Any, Any, Any]]


@asynccontextmanager
async def _sampler(stack: Any, **changes: Any) -> AsyncIterator[Any]:
    fields = {"checkpoint": str(stack.checkpoint), "dtype": "float32", "port": 0, "metrics_port": 0}
    fields |= {"encoders": stack.encoder_targets, "vae": stack.vae_target, "patience_seconds": 0.2}
    settings = SamplerSettings(**{**fields, **changes})
    service = SamplerService(settings, stack.store)
    async with (
        Server([service.served], settings, load=service.load, stop=service.close) as server,
        connect(server.target, retries=False) as channel,
    ):
        yield SamplingServiceStub(channel)


async def test_a_vae_that_is_away_makes_the_sampler_unavailable(
    stack: Any, sample: Sample, free_port: Callable[[], int]
) -> None:
    async with _sampler(stack, vae=f"127.0.0.1:{free_port()}") as stub:
        with pytest.raises(UnavailableError), translated():
            await sample(stub, seed=1)


async def test_a_vae_that_comes_back_in_time_is_waited_for(
    stack: Any, sample: Sample, free_port: Callable[[], int]
) -> None:
    port = free_port()
    fields: dict[str, Any] = {"checkpoint": str(stack.checkpoint), "dtype": "float32", "metrics_port": 0}
    settings = VaeSettings(**fields, port=port)
    vae = VaeService(settings, stack.store)
    async with _sampler(stack, vae=f"127.0.0.1:{port}", patience_seconds=30.0) as stub:
        drawing = asyncio.create_task(sample(stub, seed=2))
        await asyncio.wait([drawing], timeout=0.5)
        async with Server([vae.served], settings, load=vae.load, stop=vae.close):
            answer = await drawing
    assert len(answer.images) == 1


async def test_an_encoder_that_nobody_holds_is_named(stack: Any, sample: Sample) -> None:
    async with _sampler(stack, encoders=stack.encoder_targets[:1]) as stub:
        with pytest.raises(FailedPreconditionError) as refusal, translated():
            await sample(stub, seed=3)
    assert refusal.value.metadata == {"encoders": "t5,llama"}


async def test_the_queue_is_bounded(stack: Any, sample: Sample) -> None:
    async with _sampler(stack, max_waiting=1) as stub:
        request = sampling_pb2.SampleRequest(prompt="long", width=256, height=256, num_inference_steps=200, seed=4)
        running = stub.Sample(request)
        await running.read()
        waiting = asyncio.create_task(sample(stub, seed=5))
        await asyncio.wait([waiting], timeout=0.5)
        with pytest.raises(ResourceExhaustedError) as refusal, translated():
            await sample(stub, seed=6)
        running.cancel()
        assert len((await waiting).images) == 1
    assert refusal.value.reason == "QUEUE_FULL"
    assert refusal.value.retry_after_seconds


async def test_an_int8_transformer_draws_too(stack: Any, sample: Sample) -> None:
    async with _sampler(stack, precision="int8-quanto") as stub:
        description = await stub.DescribeSampler(sampling_pb2.DescribeSamplerRequest())
        quantised = await sample(stub, seed=7)
    plain = await sample(stack.stub, seed=7)
    assert description.precision == "int8-quanto"
    assert quantised.images[0].image.sha256 != plain.images[0].image.sha256


async def test_the_process_serves_until_sigterm(stack: Any, store_environment: dict[str, str], tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    command = [sys.executable, "-m", "reverie_sampler", "--port=0", "--metrics-port=0", f"--ready-file={ready}"]
    process = _start([*command, f"--checkpoint={stack.checkpoint}"], store_environment)
    try:
        await asyncio.to_thread(_wait_for, ready, process)
        async with connect(f"127.0.0.1:{json.loads(ready.read_text())['port']}") as channel:
            description = await SamplingServiceStub(channel).DescribeSampler(sampling_pb2.DescribeSamplerRequest())
        process.send_signal(signal.SIGTERM)
        _, log = await asyncio.to_thread(process.communicate, timeout=30)
    finally:
        process.kill()
        process.wait()
    assert description.device == "cpu"
    assert process.returncode == 0
    assert "Traceback" not in log


def _start(command: list[str], environment: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)


def _wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
