"""Schedulers, guidance rescale, compiling, sizes, previews and scores through the sampler."""

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from reverie.sampling.v1 import sampling_pb2
from reverie.sampling.v1.sampling_pb2_grpc import SamplingServiceStub
from reverie.vae.v1 import vae_pb2
from reverie.vae.v1.vae_pb2_grpc import (
    VaeServiceServicer,
    VaeServiceStub,
    add_VaeServiceServicer_to_server,
)
from reverie_common.errors import FailedPreconditionError, InvalidArgumentError
from reverie_common.rpc.channel import connect, translated
from reverie_common.rpc.server import ServedService, Server
from reverie_common.settings import ServerSettings
from reverie_common.storage import get_object
from reverie_hidream.clip_score import load_clip_scorer
from reverie_sampler.service import SamplerService
from reverie_sampler.settings import SamplerSettings
from reverie_vae.service import VaeService
from reverie_vae.settings import VaeSettings

if TYPE_CHECKING:
    from reverie.vae.v1.vae_pb2_grpc import VaeServiceAsyncStub

pytestmark = pytest.mark.asyncio(loop_scope="module")

Sample = Callable[..., Awaitable[Any]]
Open = Callable[..., Image.Image]


class VaeWithSlowPreviews(VaeServiceServicer):
    """Decodes as the real VAE does, and never answers a preview."""

    def __init__(self, real: "VaeServiceAsyncStub") -> None:
        self._real = real
        self.num_asked = 0

    async def DecodeLatents(  # noqa: N802 - gRPC's name
        self, request: vae_pb2.DecodeLatentsRequest, context: Any
    ) -> vae_pb2.DecodeLatentsResponse:
        return await self._real.DecodeLatents(request)

    async def DescribeVae(  # noqa: N802 - gRPC's name
        self, request: vae_pb2.DescribeVaeRequest, context: Any
    ) -> vae_pb2.DescribeVaeResponse:
        return await self._real.DescribeVae(request)

    async def PreviewLatents(  # noqa: N802 - gRPC's name
        self, request: vae_pb2.PreviewLatentsRequest, context: Any
    ) -> vae_pb2.PreviewLatentsResponse:
        self.num_asked += 1
        await asyncio.Event().wait()
        return vae_pb2.PreviewLatentsResponse()


@asynccontextmanager
async def slow_vae(stack: Any) -> AsyncIterator[tuple[str, VaeWithSlowPreviews]]:
    async with connect(stack.vae_target) as channel:
        servicer = VaeWithSlowPreviews(VaeServiceStub(channel))  # type: ignore[abstract]  # all that a sampler asks
        served = ServedService(
            name="reverie.vae.v1.VaeService", add_to_server=add_VaeServiceServicer_to_server, servicer=servicer
        )
        async with Server([served], ServerSettings(port=0)) as server:
            yield server.target, servicer


@asynccontextmanager
async def another_sampler(stack: Any, **changes: Any) -> AsyncIterator[Any]:
    fields = {"checkpoint": str(stack.checkpoint), "dtype": "float32", "port": 0, "metrics_port": 0}
    fields |= {"encoders": stack.encoder_targets, "vae": stack.vae_target}
    settings = SamplerSettings(**{**fields, **changes})
    service = SamplerService(settings, stack.store)
    async with (
        Server([service.served], settings, load=service.load, stop=service.close) as server,
        connect(server.target) as channel,
    ):
        yield SamplingServiceStub(channel)


@pytest.mark.parametrize(
    "change",
    [{"guidance_rescale": 0.7}, {"scheduler": "unipc"}, {"scheduler": "flash"}],
    ids=lambda change: "-".join(str(part) for part in next(iter(change.items()))),
)
async def test_a_method_makes_another_picture(stack: Any, sample: Sample, change: dict[str, Any]) -> None:
    base = await sample(stack.stub, seed=200, num_inference_steps=3)
    changed = await sample(stack.stub, seed=200, num_inference_steps=3, **change)
    again = await sample(stack.stub, seed=200, num_inference_steps=3, **change)
    assert changed.images[0].image.sha256 != base.images[0].image.sha256
    assert (again.steps, again.images[0].image) == ([], changed.images[0].image)


async def test_the_checkpoint_s_own_scheduler_has_a_name_too(stack: Any, sample: Sample) -> None:
    own = await sample(stack.stub, seed=201)
    named = await sample(stack.stub, seed=201, scheduler="euler")
    assert named.images[0].image.sha256 == own.images[0].image.sha256


async def test_a_compiled_picture_is_the_same_picture(stack: Any, sample: Sample, open_picture: Open) -> None:
    plain = await sample(stack.stub, seed=202)
    compiled = await sample(stack.stub, seed=202, compile=True)
    difference = np.asarray(open_picture(plain.images[0]), np.int16) - np.asarray(open_picture(compiled.images[0]))
    assert len(compiled.steps) == 2  # drawn, not found
    assert compiled.notices == []
    assert np.abs(difference).max() <= 1


async def test_where_nothing_can_be_compiled_the_picture_comes_with_a_notice(stack: Any, sample: Sample) -> None:
    async with another_sampler(stack, compile_backend="cudagraphs_of_another_machine") as stub:
        answer = await sample(stub, seed=203, compile=True)
    assert (len(answer.images), answer.notices) == (1, ["NOT_COMPILED"])


@pytest.mark.parametrize("size", [(512, 512), (128, 256), (256, 64)])
async def test_pictures_have_the_size_asked_for(
    stack: Any, sample: Sample, open_picture: Open, size: tuple[int, int]
) -> None:
    # 512 x 512 is to this canvas what 2048 x 2048 is to the released model's: four times its area.
    answer = await sample(stack.stub, width=size[0], height=size[1], num_inference_steps=1, guidance_scale=1.0)
    assert (answer.images[0].width, answer.images[0].height) == size
    assert open_picture(answer.images[0]).size == size


async def test_previews_stream_while_the_picture_is_drawn(stack: Any, sample: Sample, open_picture: Open) -> None:
    request: dict[str, Any] = {"seed": 204, "num_inference_steps": 20, "guidance_scale": 1.0, "num_images": 2}
    answer = await sample(stack.stub, **request, preview_steps=5)
    assert [(one.image_index, one.step, one.num_steps) for one in answer.previews] == [
        (index, step, 20) for index in (0, 1) for step in (1, 5, 10, 15, 20)
    ]
    assert answer.previews[0].timestep == 1000.0
    assert all(earlier.timestep > later.timestep for earlier, later in pairwise(answer.previews[:5]))
    assert open_picture(answer.previews[0]).size == (64, 64)
    assert len({one.image.sha256 for one in answer.previews}) == 10
    assert answer.previews[0].download_url.startswith("http")


async def test_previews_change_no_picture_and_are_not_made_for_a_stored_one(stack: Any, sample: Sample) -> None:
    with_previews = await sample(stack.stub, seed=205, preview_steps=1)
    again = await sample(stack.stub, seed=205, preview_steps=1)
    assert [one.step for one in with_previews.previews] == [1, 2]
    assert (again.previews, again.steps) == ([], [])
    assert again.images[0].image == with_previews.images[0].image


async def test_a_vae_that_is_slow_with_previews_holds_nothing_up(stack: Any, sample: Sample) -> None:
    async with slow_vae(stack) as (target, vae), another_sampler(stack, vae=target) as stub:
        async with asyncio.timeout(30):
            answer = await sample(stub, seed=206, num_inference_steps=20, preview_steps=1)
    assert (len(answer.images), len(answer.steps), answer.previews) == (1, 20, [])
    assert vae.num_asked == 1  # one at a time; the others were dropped


async def test_a_vae_without_a_tiny_decoder_costs_previews_alone(stack: Any, sample: Sample) -> None:
    fields: dict[str, Any] = {"checkpoint": str(stack.checkpoint), "dtype": "float32", "port": 0, "metrics_port": 0}
    settings = VaeSettings(**fields, preview_decoder="none")
    vae = VaeService(settings, stack.store)
    async with (
        Server([vae.served], settings, load=vae.load, stop=vae.close) as server,
        another_sampler(stack, vae=server.target) as stub,
    ):
        described = await stub.DescribeSampler(sampling_pb2.DescribeSamplerRequest())
        answer = await sample(stub, seed=207, preview_steps=1)
    assert not described.has_previews
    assert (len(answer.images), answer.previews, answer.notices) == (1, [], ["PREVIEWS_LOST"])


async def test_every_picture_is_scored(stack: Any, sample: Sample, tiny_clip: Path) -> None:
    answer = await sample(stack.stub, seed=208, num_images=2, clip_score=True)
    scorer = load_clip_scorer(tiny_clip)
    for sampled in answer.images:
        picture = Image.open(io.BytesIO(get_object(stack.store, sampled.image)))
        assert sampled.HasField("clip_score")
        assert sampled.clip_score == pytest.approx(scorer.score(picture, "a red circle"), abs=1e-3)
    unasked = await sample(stack.stub, seed=208, num_images=2)
    assert not unasked.images[0].HasField("clip_score")


async def test_the_sampler_says_what_it_can_do(stack: Any, tiny_clip: Path) -> None:
    described = await stack.stub.DescribeSampler(sampling_pb2.DescribeSamplerRequest())
    assert (described.clip_model, described.has_previews) == (str(tiny_clip), True)


async def test_scores_without_a_model_are_refused(stack: Any, sample: Sample) -> None:
    async with another_sampler(stack) as stub:
        with pytest.raises(FailedPreconditionError, match="start it with --clip-model") as refusal, translated():
            await sample(stub, seed=209, clip_score=True)
    assert refusal.value.reason == "NO_CLIP_MODEL"


async def test_a_model_that_cannot_be_read_costs_the_score_alone(stack: Any, sample: Sample, tmp_path: Path) -> None:
    async with another_sampler(stack, clip_model=str(tmp_path)) as stub:
        answer = await sample(stub, seed=210, clip_score=True)
    assert (len(answer.images), answer.notices) == (1, ["CLIP_SCORE_LOST"])
    assert not answer.images[0].HasField("clip_score")


async def test_wrong_methods_are_named(stack: Any, sample: Sample) -> None:
    with pytest.raises(InvalidArgumentError) as refusal, translated():
        await sample(stack.stub, guidance_rescale=1.5, scheduler="ddim", preview_steps=1000)
    fields = [violation.field for violation in refusal.value.violations]
    assert fields == ["guidance_rescale", "scheduler", "preview_steps"]
