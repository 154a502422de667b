"""A sampler with real encoders and a real VAE behind real sockets, on a real store, for the tests of a module."""

import hashlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
import torch
from PIL import Image
from reverie.common.v1.common_pb2 import ObjectRef
from reverie.sampling.v1 import sampling_pb2
from reverie.sampling.v1.sampling_pb2_grpc import SamplingServiceStub
from reverie_common.rpc.channel import connect
from reverie_common.rpc.server import Server
from reverie_common.storage import ObjectStore, S3Store, get_object, put_object
from reverie_common.storage.keys import adapter_snapshot_key
from reverie_encoder.service import EncoderService
from reverie_encoder.settings import EncoderSettings
from reverie_hidream.adapters.config import LokrConfig
from reverie_hidream.adapters.lokr import attach_lokr
from reverie_hidream.transformer import load_transformer
from reverie_sampler.service import SamplerService
from reverie_sampler.settings import SamplerSettings
from reverie_vae.service import VaeService
from reverie_vae.settings import VaeSettings

if TYPE_CHECKING:
    from reverie.sampling.v1.sampling_pb2_grpc import SamplingServiceAsyncStub


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """The services of a module."""

    stub: "SamplingServiceAsyncStub"
    store: ObjectStore
    encoder_targets: tuple[str, ...]
    vae_target: str
    target: str
    """Of the sampler."""
    checkpoint: Path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tiny_checkpoint: Path, module_s3_store: S3Store, tiny_clip: Path) -> AsyncIterator[Stack]:
    """Two encoder services, a VAE and a sampler with a CLIP model."""
    common: dict[str, Any] = {
        "checkpoint": str(tiny_checkpoint),
        "dtype": "float32",
        "port": 0,
        "metrics_port": 0,
    }
    clips = EncoderService(EncoderSettings(**common, encoders=("clip_l", "clip_g")), module_s3_store)
    others = EncoderService(EncoderSettings(**common, encoders=("t5", "llama")), module_s3_store)
    vae = VaeService(VaeSettings(**common), module_s3_store)
    async with (
        Server([clips.served], EncoderSettings(**common), load=clips.load, stop=clips.close) as clip_server,
        Server([others.served], EncoderSettings(**common), load=others.load, stop=others.close) as other_server,
        Server([vae.served], VaeSettings(**common), load=vae.load, stop=vae.close) as vae_server,
    ):
        targets = (clip_server.target, other_server.target)
        settings = SamplerSettings(
            **common,
            encoders=targets,
            vae=vae_server.target,
            max_adapters=2,
            clip_model=str(tiny_clip),
            compile_backend="eager",
        )
        sampler = SamplerService(settings, module_s3_store)
        async with (
            Server([sampler.served], settings, load=sampler.load, stop=sampler.close) as server,
            connect(server.target) as channel,
        ):
            yield Stack(
                stub=SamplingServiceStub(channel),
                store=module_s3_store,
                encoder_targets=targets,
                vae_target=vae_server.target,
                target=server.target,
                checkpoint=tiny_checkpoint,
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Everything that one request was answered."""

    steps: list[tuple[int, int]]
    images: list[sampling_pb2.SampledImage]
    previews: list[sampling_pb2.SamplingPreview]
    notices: list[str]
    """Reasons."""


Sample = Callable[..., Awaitable[Answer]]


@pytest.fixture(scope="module")
def sample() -> Sample:
    """Draws pictures of 64 pixels in 2 steps unless told otherwise."""

    async def ask(stub: "SamplingServiceAsyncStub", **fields: Any) -> Answer:
        defaults = {
            "prompt": "a red circle",
            "width": 64,
            "height": 64,
            "num_inference_steps": 2,
            "guidance_scale": 3.0,
        }
        request = sampling_pb2.SampleRequest(**{**defaults, **fields})
        answers = [answer async for answer in stub.Sample(request)]
        return Answer(
            steps=[(one.progress.step, one.progress.num_steps) for one in answers if one.HasField("progress")],
            images=[one.image for one in answers if one.HasField("image")],
            previews=[one.preview for one in answers if one.HasField("preview")],
            notices=[one.notice.reason for one in answers if one.HasField("notice")],
        )

    return ask


@pytest.fixture(scope="module")
def open_picture(stack: Stack) -> Callable[[sampling_pb2.SampledImage], Image.Image]:
    """Reads a picture from the store."""
    return lambda sampled: Image.open(io.BytesIO(get_object(stack.store, sampled.image)))


@pytest.fixture(scope="module")
def make_adapter(tiny_checkpoint: Path, module_s3_store: S3Store) -> Callable[[int], ObjectRef]:
    """Writes an adapter that visibly changes pictures; another seed is another adapter."""

    def make(seed: int) -> ObjectRef:
        adapter = attach_lokr(load_transformer(tiny_checkpoint), LokrConfig(factor=4), seed=seed)
        state = adapter.raw_state()
        generator = torch.Generator().manual_seed(seed)
        for tensor in state.values():
            tensor.normal_(std=0.3, generator=generator)
        adapter.load_raw_state(state)
        body = adapter.export()
        sha256 = hashlib.sha256(body).hexdigest()
        return put_object(module_s3_store, adapter_snapshot_key(sha256), body)

    return make
