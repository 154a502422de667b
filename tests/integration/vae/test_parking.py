"""ReleaseMemory of the VAE service: it is back for the next image."""

from typing import Any

import pytest
from prometheus_client import generate_latest
from reverie.vae.v1 import vae_pb2
from reverie_common.telemetry.metrics import REGISTRY

pytestmark = pytest.mark.asyncio(loop_scope="module")


def parked() -> bool:
    """What the gauge says."""
    return "reverie_vae_parked 1.0" in generate_latest(REGISTRY).decode()


async def test_release_memory_parks_until_the_next_image(stub: Any, upload: Any, picture: Any, save: Any) -> None:
    async def encode(seed: int) -> vae_pb2.EncodeImagesResponse:
        image = upload(save(picture(seed=seed), "PNG"))
        plan = vae_pb2.ImagePlan(image=image, resize_width=160, resize_height=128, width=128, height=128)
        answers: list[vae_pb2.EncodeImagesResponse] = [
            answer async for answer in stub.EncodeImages(vae_pb2.EncodeImagesRequest(images=[plan]))
        ]
        return answers[0]

    await encode(77)
    described = await stub.DescribeVae(vae_pb2.DescribeVaeRequest())
    assert (await stub.ReleaseMemory(vae_pb2.ReleaseMemoryRequest())).released
    assert parked()
    assert await stub.DescribeVae(vae_pb2.DescribeVaeRequest()) == described
    again = await encode(78)
    assert not parked()
    assert not again.cached
