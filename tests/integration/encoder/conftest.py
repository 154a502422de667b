"""An encoder service with all four encoders of the tiny checkpoint, on a real store, for the tests of a module."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from reverie.encoder.v1 import encoder_pb2
from reverie.encoder.v1.encoder_pb2_grpc import EncoderServiceStub
from reverie_common.rpc.channel import connect
from reverie_common.rpc.server import Server
from reverie_common.storage import S3Store
from reverie_encoder.service import EncoderService
from reverie_encoder.settings import EncoderSettings

if TYPE_CHECKING:
    from reverie.encoder.v1.encoder_pb2_grpc import EncoderServiceAsyncStub

Ask = Callable[..., Awaitable[dict[int, encoder_pb2.EncodePromptsResponse]]]


@pytest.fixture(scope="module")
def encoder_settings(tiny_checkpoint: Path) -> EncoderSettings:
    """Settings of a process that holds all four."""
    return EncoderSettings(checkpoint=str(tiny_checkpoint), dtype="float32", port=0, metrics_port=0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stub(encoder_settings: EncoderSettings, module_s3_store: S3Store) -> AsyncIterator["EncoderServiceAsyncStub"]:
    """A stub of the module's service."""
    service = EncoderService(encoder_settings, module_s3_store)
    async with (
        Server([service.served], encoder_settings, load=service.load, stop=service.close) as server,
        connect(server.target) as channel,
    ):
        yield EncoderServiceStub(channel)


@pytest.fixture(scope="module")
def ask() -> Ask:
    """Encodes prompts and gives the answers by index, each exactly once."""

    async def encode(
        stub: "EncoderServiceAsyncStub",
        prompts: Sequence[str],
        encoders: Sequence[encoder_pb2.Encoder.ValueType] = (),
        storage: str = "",
    ) -> dict[int, encoder_pb2.EncodePromptsResponse]:
        request = encoder_pb2.EncodePromptsRequest(prompts=prompts, encoders=encoders, storage=storage)
        call = stub.EncodePrompts(request)
        answers = [answer async for answer in call]
        assert sorted(answer.prompt_index for answer in answers) == list(range(len(prompts)))
        return {answer.prompt_index: answer for answer in answers}

    return encode
