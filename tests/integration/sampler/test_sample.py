"""Pictures through the sampler: what is drawn, what is remembered, what is refused."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import urllib3
from PIL import Image
from reverie.common.v1.common_pb2 import ObjectRef
from reverie.sampling.v1 import sampling_pb2
from reverie_common.errors import InvalidArgumentError, NotFoundError
from reverie_common.rpc.channel import translated
from reverie_common.storage import put_object

pytestmark = pytest.mark.asyncio(loop_scope="module")

Sample = Callable[..., Awaitable[Any]]


async def test_draws_at_the_size_asked_for_and_counts_every_step(
    stack: Any, sample: Sample, open_picture: Callable[..., Image.Image]
) -> None:
    answer = await sample(stack.stub, width=96, height=64, num_inference_steps=3, num_images=2)
    assert answer.steps == [(step, 6) for step in range(1, 7)]
    assert [(image.image_index, image.seed) for image in answer.images] == [(0, 0), (1, 1)]
    assert open_picture(answer.images[0]).size == (96, 64)
    assert answer.images[0].image.sha256 != answer.images[1].image.sha256
    assert answer.images[0].image.media_type == "image/png"


async def test_the_same_request_again_is_answered_from_the_store(stack: Any, sample: Sample) -> None:
    first = await sample(stack.stub, seed=7)
    again = await sample(stack.stub, seed=7)
    assert (len(first.steps), again.steps) == (2, [])
    assert again.images[0].image == first.images[0].image


async def test_what_changes_nothing_does_not_make_another_picture(stack: Any, sample: Sample) -> None:
    unguided = await sample(stack.stub, guidance_scale=1.0, negative_prompt="blurry")
    again = await sample(stack.stub, guidance_scale=0.0, negative_prompt="ugly", adapter_strength=3.0)
    assert again.images[0].image == unguided.images[0].image


@pytest.mark.parametrize(
    "change",
    [{"prompt": "a blue square"}, {"negative_prompt": "blurry"}, {"seed": 1}, {"guidance_scale": 4.0}, {"shift": 1.0}],
    ids=lambda change: next(iter(change)),
)
async def test_what_matters_makes_another_picture(stack: Any, sample: Sample, change: dict[str, Any]) -> None:
    base = await sample(stack.stub, num_inference_steps=3)
    changed = await sample(stack.stub, num_inference_steps=3, **change)
    assert changed.images[0].image.sha256 != base.images[0].image.sha256


async def test_a_picture_does_not_depend_on_the_others_of_its_request(stack: Any, sample: Sample) -> None:
    together = await sample(stack.stub, seed=20, num_images=2)
    alone = await sample(stack.stub, seed=21)
    assert alone.images[0].image == together.images[1].image


async def test_adapters_are_swapped_and_leave_no_trace(
    stack: Any, sample: Sample, make_adapter: Callable[[int], ObjectRef]
) -> None:
    first, second = make_adapter(1), make_adapter(2)
    base = await sample(stack.stub, seed=30)
    with_first = await sample(stack.stub, seed=30, adapter=first)
    with_second = await sample(stack.stub, seed=30, adapter=second)
    weaker = await sample(stack.stub, seed=30, adapter=second, adapter_strength=0.5)
    switched_off = await sample(stack.stub, seed=30, adapter=first, adapter_strength=0.0)
    digests = [answer.images[0].image.sha256 for answer in (base, with_first, with_second, weaker)]
    assert len(set(digests)) == 4
    assert switched_off.images[0].image.sha256 == base.images[0].image.sha256


async def test_adapters_in_memory_are_bounded_and_described(
    stack: Any, sample: Sample, make_adapter: Callable[[int], ObjectRef]
) -> None:
    adapters = [make_adapter(seed) for seed in (3, 4, 5)]
    for adapter in adapters:
        await sample(stack.stub, seed=40, adapter=adapter)
    description = await stack.stub.DescribeSampler(sampling_pb2.DescribeSamplerRequest())
    assert list(description.adapter_sha256s) == [adapters[2].sha256, adapters[1].sha256]
    assert (description.precision, description.device) == ("no_change", "cpu")
    assert description.max_pixels == 256 * 256
    assert len(description.fingerprint) == 64


async def test_a_picture_can_be_downloaded_without_credentials(stack: Any, sample: Sample) -> None:
    answer = await sample(stack.stub, seed=50)
    url = answer.images[0].download_url
    response = await asyncio.to_thread(urllib3.request, "GET", url)
    assert hashlib.sha256(response.data).hexdigest() == answer.images[0].image.sha256


async def test_every_violation_is_told_at_once(stack: Any, sample: Sample) -> None:
    with pytest.raises(InvalidArgumentError) as refusal, translated():
        await sample(
            stack.stub,
            prompt="x" * 10_000,
            width=100,
            height=0,
            num_inference_steps=0,
            num_images=17,
            guidance_scale=float("nan"),
            shift=-1.0,
            adapter=ObjectRef(uri="s3://elsewhere/key"),
            adapter_strength=float("inf"),
        )
    fields = [violation.field for violation in refusal.value.violations]
    assert fields == [
        "prompt",
        "width",
        "height",
        "num_inference_steps",
        "num_images",
        "guidance_scale",
        "shift",
        "adapter_strength",
        "adapter.uri",
        "adapter.sha256",
    ]


async def test_a_picture_over_the_canvas_is_refused_unless_it_is_square(stack: Any, sample: Sample) -> None:
    with pytest.raises(InvalidArgumentError) as refusal, translated():
        await sample(stack.stub, width=512, height=256)
    assert "65536" in refusal.value.violations[0].description


async def test_an_adapter_that_is_gone_is_named(stack: Any, sample: Sample) -> None:
    missing = ObjectRef(uri=stack.store.uri("v1/adapter/00/none"), sha256="0" * 64)
    with pytest.raises(NotFoundError), translated():
        await sample(stack.stub, seed=60, adapter=missing)


async def test_a_file_that_is_no_adapter_is_refused(stack: Any, sample: Sample) -> None:
    ref = put_object(stack.store, "v1/adapter/00/noise", b"not an adapter")
    with pytest.raises(InvalidArgumentError) as refusal, translated():
        await sample(stack.stub, seed=61, adapter=ref)
    assert refusal.value.reason == "UNUSABLE_ADAPTER"


async def test_a_caller_that_leaves_frees_the_sampler(stack: Any, sample: Sample) -> None:
    request = sampling_pb2.SampleRequest(prompt="long", width=256, height=256, num_inference_steps=200)
    call = stack.stub.Sample(request)
    first = await call.read()
    assert first.progress.step == 1
    call.cancel()
    async with asyncio.timeout(20):
        answer = await sample(stack.stub, seed=70)
    assert len(answer.images) == 1


async def test_equal_requests_at_the_same_time_are_drawn_once(stack: Any, sample: Sample) -> None:
    answers = await asyncio.gather(*(sample(stack.stub, seed=80, num_inference_steps=4) for _ in range(3)))
    assert sorted(len(answer.steps) for answer in answers) == [0, 0, 4]
    assert len({answer.images[0].image.sha256 for answer in answers}) == 1


async def test_equals_the_pipeline_of_the_model(
    stack: Any, sample: Sample, open_picture: Callable[..., Image.Image]
) -> None:
    answer = await sample(stack.stub, seed=90, num_inference_steps=4, negative_prompt="blurry")
    expected = await asyncio.to_thread(_reference, stack.checkpoint)
    actual = np.asarray(open_picture(answer.images[0])).astype(np.int16)
    assert np.abs(actual - expected).max() <= 1


def _reference(checkpoint: Path) -> np.ndarray[Any, np.dtype[np.int16]]:
    """The same picture by diffusers' own pipeline, which is told not to rescale."""
    pipeline = diffusers.HiDreamImagePipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipeline.default_sample_size = 8
    pipeline.set_progress_bar_config(disable=True)
    picture: np.ndarray[Any, np.dtype[np.float32]] = pipeline(
        prompt="a red circle",
        negative_prompt="blurry",
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(90),
        output_type="np",
    ).images[0]
    return (picture * 255).round().astype(np.int16)
