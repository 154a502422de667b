"""ReleaseMemory and --idle-seconds of the encoder service: embeddings and descriptions are as before."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import generate_latest
from reverie.encoder.v1 import encoder_pb2
from reverie.encoder.v1.encoder_pb2_grpc import EncoderServiceStub
from reverie_common.rpc.channel import connect
from reverie_common.rpc.server import Server
from reverie_common.storage import S3Store
from reverie_common.telemetry.metrics import REGISTRY
from reverie_encoder.service import EncoderService
from reverie_encoder.settings import EncoderSettings

if TYPE_CHECKING:
    from reverie.encoder.v1.encoder_pb2_grpc import EncoderServiceAsyncStub


@pytest.fixture
async def stub(s3_store: S3Store, tiny_checkpoint: Path) -> AsyncIterator["EncoderServiceAsyncStub"]:
    """A service with one encoder that is parked after a moment."""
    settings = EncoderSettings(
        checkpoint=str(tiny_checkpoint), encoders=("clip_l",), idle_seconds=0.2, port=0, metrics_port=0
    )
    service = EncoderService(settings, s3_store)
    async with (
        Server([service.served], settings, load=service.load, stop=service.close) as server,
        connect(server.target) as channel,
    ):
        yield EncoderServiceStub(channel)


def parked() -> bool:
    """What the gauge of clip_l says."""
    return 'reverie_encoder_parked{encoder="clip_l"} 1.0' in generate_latest(REGISTRY).decode()


async def encode(stub: Any, prompt: str) -> str:
    request = encoder_pb2.EncodePromptsRequest(prompts=[prompt])
    (answer,) = [answer async for answer in stub.EncodePrompts(request)]
    sha256: str = answer.embeddings[0].tensor.sha256
    return sha256


async def until_parked() -> None:
    for _ in range(2000):
        if parked():
            return
        await asyncio.sleep(0.01)
    pytest.fail("clip_l was not parked within 20 s")


async def test_an_idle_encoder_is_parked_and_back_for_its_next_prompt(stub: Any) -> None:
    await until_parked()
    described = await stub.DescribeEncoders(encoder_pb2.DescribeEncodersRequest())
    await encode(stub, "a red fox")
    await until_parked()
    assert await stub.DescribeEncoders(encoder_pb2.DescribeEncodersRequest()) == described


async def test_release_memory_parks_at_once(stub: Any) -> None:
    await encode(stub, "a blue fox")
    response = await stub.ReleaseMemory(encoder_pb2.ReleaseMemoryRequest())
    assert response.released
    assert parked()
