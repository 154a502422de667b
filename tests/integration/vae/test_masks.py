"""Masks: brought to latent size as their images are, once, and refused where they do not lie over them."""

import hashlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reverie.common.v1.common_pb2 import ObjectRef
from reverie.vae.v1 import vae_pb2
from reverie_common.errors import InvalidArgumentError
from reverie_common.rpc.channel import connect, translated
from reverie_common.rpc.server import Server
from reverie_common.storage import S3Store, get_tensor
from reverie_common.storage.seaweed import Seaweed
from reverie_hidream.tensor_io import from_raw
from reverie_vae.service import VaeService
from reverie_vae.settings import VaeSettings

pytestmark = pytest.mark.asyncio(loop_scope="module")


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def plan(image: ObjectRef, **changes: int) -> vae_pb2.ImagePlan:
    whole = {"resize_width": 128, "resize_height": 64, "crop_left": 0, "crop_top": 0, "width": 128, "height": 64}
    return vae_pb2.ImagePlan(image=image, **{**whole, **changes})


async def encode(stub: Any, *plans: vae_pb2.ImagePlan) -> list[vae_pb2.EncodeMasksResponse]:
    request = vae_pb2.EncodeMasksRequest(masks=plans)
    return sorted([answer async for answer in stub.EncodeMasks(request)], key=lambda answer: answer.mask_index)


async def test_a_mask_is_the_mean_over_channels_and_areas(
    stub: Any, upload: Callable[[bytes], ObjectRef], module_s3_store: S3Store
) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    answer = (await encode(stub, plan(upload(png(pixels)))))[0]
    mask = from_raw(get_tensor(module_s3_store, answer.mask)).numpy()
    # Rows and columns of 8 pixels each, in float64.
    expected = pixels.astype(np.float64).mean(axis=2).reshape(8, 8, 16, 8).mean(axis=(1, 3)) / 255
    assert mask.shape == (1, 8, 16)
    assert mask.dtype == np.float32
    assert np.abs(mask[0] - expected).max() < 1e-6


async def test_a_mask_is_cropped_as_its_image(
    stub: Any, upload: Callable[[bytes], ObjectRef], module_s3_store: S3Store
) -> None:
    pixels = np.zeros((64, 192), dtype=np.uint8)
    pixels[:, 96:] = 255
    answer = (await encode(stub, plan(upload(png(pixels)), resize_width=192, crop_left=64)))[0]
    mask = from_raw(get_tensor(module_s3_store, answer.mask)).numpy()
    assert np.array_equal(mask[0, 0], [0.0] * 4 + [1.0] * 12)


async def test_a_mask_is_made_once(stub: Any, upload: Callable[[bytes], ObjectRef]) -> None:
    image = upload(png(np.full((64, 128), 7, dtype=np.uint8)))
    first, again = (await encode(stub, plan(image)))[0], (await encode(stub, plan(image)))[0]
    assert (first.cached, again.cached) == (False, True)
    assert first.mask == again.mask
    # Another crop is another mask.
    moved = (await encode(stub, plan(image, resize_width=192, resize_height=96, crop_left=1)))[0]
    assert moved.mask.uri != first.mask.uri


async def test_a_mask_of_other_proportions_is_refused_by_itself(
    stub: Any, upload: Callable[[bytes], ObjectRef]
) -> None:
    wrong = upload(png(np.zeros((100, 100), dtype=np.uint8)))
    right = upload(png(np.zeros((50, 100), dtype=np.uint8)))
    refused, accepted = await encode(stub, plan(wrong), plan(right))
    assert refused.rejection.reason == vae_pb2.REJECTION_REASON_OTHER_PROPORTIONS
    assert "aspect 1.000, its image has 2.000" in refused.rejection.message
    assert accepted.HasField("mask")


async def test_a_broken_mask_is_refused_with_its_reason(stub: Any, upload: Callable[[bytes], ObjectRef]) -> None:
    answer = (await encode(stub, plan(upload(b"no image at all"))))[0]
    assert answer.rejection.reason == vae_pb2.REJECTION_REASON_NOT_AN_IMAGE


async def test_a_wrong_plan_is_refused_by_field(stub: Any, upload: Callable[[bytes], ObjectRef]) -> None:
    image = upload(png(np.zeros((64, 128), dtype=np.uint8)))
    with pytest.raises(InvalidArgumentError) as caught, translated():
        await encode(stub, plan(image, width=100))
    assert [violation.field for violation in caught.value.violations] == ["masks[0].width"]


async def test_images_of_another_bucket_are_read_only_where_that_is_allowed(
    vae_settings: VaeSettings, module_s3_store: S3Store, seaweed: Seaweed, stub: Any
) -> None:
    other = module_s3_store.sibling(f"{module_s3_store.bucket[:50]}-photos")
    other.make_bucket()
    body = png(np.full((64, 128, 3), 200, dtype=np.uint8))
    other.replace("cats/a.png", body)
    sha256 = hashlib.sha256(body).hexdigest()
    image = ObjectRef(uri=other.uri("cats/a.png"), size_bytes=len(body), sha256=sha256)
    request = vae_pb2.InspectImagesRequest(images=[image])
    with pytest.raises(InvalidArgumentError, match="is not in this store"), translated():
        [answer async for answer in stub.InspectImages(request)]
    settings = vae_settings.model_copy(update={"source_buckets": (other.bucket,)})
    service = VaeService(settings, module_s3_store)
    async with (
        Server([service.served], settings, load=service.load, stop=service.close) as server,
        connect(server.target) as channel,
    ):
        allowed = type(stub)(channel)
        found = [answer async for answer in allowed.InspectImages(request)]
        encoded = [answer async for answer in allowed.EncodeImages(vae_pb2.EncodeImagesRequest(images=[plan(image)]))]
    assert (found[0].image.width, found[0].image.height) == (128, 64)
    # What is made of it lies in the service's own bucket.
    assert encoded[0].moments.tensor.uri.startswith(f"s3://{module_s3_store.bucket}/")
