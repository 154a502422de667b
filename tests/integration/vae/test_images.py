"""InspectImages and EncodeImages over real gRPC and a real store, against the VAE called directly."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from reverie.common.v1.common_pb2 import ObjectRef
from reverie.vae.v1 import vae_pb2
from reverie.vae.v1.vae_pb2_grpc import VaeServiceStub
from reverie_common.errors import InvalidArgumentError, UnavailableError
from reverie_common.rpc.channel import connect, translated
from reverie_common.rpc.server import Server
from reverie_common.storage import S3Store, get_tensor
from reverie_common.storage.keys import image_key
from reverie_common.storage.seaweed import Seaweed
from reverie_hidream.tensor_io import from_raw
from reverie_hidream.vae import load_vae
from reverie_vae.images import ResizeCrop, read_pixels
from reverie_vae.service import VaeService
from reverie_vae.settings import VaeSettings

if TYPE_CHECKING:
    from reverie.vae.v1.vae_pb2_grpc import VaeServiceAsyncStub

pytestmark = pytest.mark.asyncio(loop_scope="module")

Upload = Callable[[bytes], ObjectRef]
Picture = Callable[..., Image.Image]
Save = Callable[..., bytes]

PLAN = ResizeCrop(resize_width=130, resize_height=104, crop_left=1, crop_top=20, width=128, height=64)


def planned(image: ObjectRef, plan: ResizeCrop = PLAN) -> vae_pb2.ImagePlan:
    """An image with its plan."""
    return vae_pb2.ImagePlan(
        image=image,
        resize_width=plan.resize_width,
        resize_height=plan.resize_height,
        crop_left=plan.crop_left,
        crop_top=plan.crop_top,
        width=plan.width,
        height=plan.height,
    )


async def encode(
    stub: "VaeServiceAsyncStub", images: Sequence[vae_pb2.ImagePlan]
) -> list[vae_pb2.EncodeImagesResponse]:
    """All answers in the order of the images."""
    answers = [answer async for answer in stub.EncodeImages(vae_pb2.EncodeImagesRequest(images=images))]
    assert sorted(answer.image_index for answer in answers) == list(range(len(images)))
    return sorted(answers, key=lambda answer: answer.image_index)


async def inspect(stub: "VaeServiceAsyncStub", images: Sequence[ObjectRef]) -> list[vae_pb2.InspectImagesResponse]:
    """All answers in the order of the images."""
    answers = [answer async for answer in stub.InspectImages(vae_pb2.InspectImagesRequest(images=images))]
    assert sorted(answer.image_index for answer in answers) == list(range(len(images)))
    return sorted(answers, key=lambda answer: answer.image_index)


async def test_latents_equal_the_vae_called_directly(
    stub: "VaeServiceAsyncStub",
    upload: Upload,
    picture: Picture,
    save: Save,
    module_s3_store: S3Store,
    tiny_checkpoint: Path,
) -> None:
    files = [save(picture(seed=seed), format_name) for seed, format_name in enumerate(["JPEG", "PNG", "WEBP"])]
    answers = await encode(stub, [planned(upload(file)) for file in files])
    vae = load_vae(tiny_checkpoint, dtype=torch.float32)
    for file, answer in zip(files, answers, strict=True):
        pixels = read_pixels(file, PLAN).to(torch.float32) / 127.5 - 1
        stored = from_raw(get_tensor(module_s3_store, answer.moments.tensor))
        assert torch.equal(stored, vae.encode(pixels[None])[0])
        assert list(answer.moments.tensor.shape) == [2, 16, 8, 16]
        assert answer.moments.tensor.dtype == "F32"


async def test_only_what_changed_is_encoded_again(
    stub: "VaeServiceAsyncStub", upload: Upload, picture: Picture, save: Save
) -> None:
    images = [picture(seed=seed) for seed in (10, 11, 12)]
    plans = [planned(upload(save(image, "PNG"))) for image in images]
    fresh = await encode(stub, plans)
    images[1].putpixel((5, 5), (1, 2, 3))
    plans[1] = planned(upload(save(images[1], "PNG")))
    plans[2].crop_left = 2
    again = await encode(stub, plans)
    assert [answer.cached for answer in fresh] == [False, False, False]
    assert [answer.cached for answer in again] == [True, False, False]
    assert again[0].moments == fresh[0].moments


async def test_another_process_finds_the_latents(
    stub: "VaeServiceAsyncStub", upload: Upload, picture: Picture, save: Save, module_s3_store: S3Store,
    vae_settings: VaeSettings,
) -> None:  # fmt: skip
    plans = [planned(upload(save(picture(seed=20), "PNG")))]
    await encode(stub, plans)
    another = VaeService(vae_settings, module_s3_store)
    async with (
        Server([another.served], vae_settings, load=another.load, stop=another.close) as server,
        connect(server.target) as channel,
    ):
        answers = await encode(VaeServiceStub(channel), plans)
    assert [answer.cached for answer in answers] == [True]


async def test_concurrent_requests_share_one_computation(
    stub: "VaeServiceAsyncStub", upload: Upload, picture: Picture, save: Save
) -> None:
    plans = [planned(upload(save(picture(seed=seed), "JPEG"))) for seed in (30, 31, 32)]
    answers = await asyncio.gather(*(encode(stub, plans) for _ in range(5)))
    assert sum(not answer.cached for each in answers for answer in each) == len(plans)


async def test_images_of_different_sizes_share_a_request(
    stub: "VaeServiceAsyncStub", upload: Upload, picture: Picture, save: Save
) -> None:
    image = upload(save(picture(seed=40), "JPEG"))
    square = ResizeCrop(resize_width=80, resize_height=64, crop_left=8, crop_top=0, width=64, height=64)
    answers = await encode(stub, [planned(image, plan) for plan in (PLAN, square, PLAN, square)])
    assert [list(answer.moments.tensor.shape[2:]) for answer in answers] == [[8, 16], [8, 8], [8, 16], [8, 8]]
    assert sum(not answer.cached for answer in answers) == 2


@pytest.fixture(scope="module")
def bad_images(upload: Upload, picture: Picture, save: Save, module_s3_store: S3Store) -> dict[int, ObjectRef]:
    """One file for each reason that does not need 256 MiB."""
    photo, frames = save(picture(seed=50), "JPEG"), [picture(64, 64, seed) for seed in (51, 52)]
    animation = save(frames[0], "GIF", save_all=True, append_images=frames[1:])
    replaced = "0" * 63 + "1"
    module_s3_store.create(image_key(replaced), photo)
    absent = hashlib.sha256(b"never uploaded").hexdigest()
    return {
        vae_pb2.REJECTION_REASON_MISSING: ObjectRef(uri=module_s3_store.uri(image_key(absent)), sha256=absent),
        vae_pb2.REJECTION_REASON_EMPTY: upload(b""),
        vae_pb2.REJECTION_REASON_NOT_AN_IMAGE: upload(b"meeting notes, not a picture\n" * 9),
        vae_pb2.REJECTION_REASON_CORRUPT: upload(photo[:-500]),
        vae_pb2.REJECTION_REASON_TOO_MANY_PIXELS: upload(save(picture(640, 480, 53), "JPEG")),
        vae_pb2.REJECTION_REASON_ANIMATED: upload(animation),
        vae_pb2.REJECTION_REASON_DIGEST_MISMATCH: ObjectRef(
            uri=module_s3_store.uri(image_key(replaced)), sha256=replaced
        ),
        vae_pb2.REJECTION_REASON_TOO_MANY_BYTES: ObjectRef(
            uri=module_s3_store.uri(image_key(absent)), sha256="1" * 64, size_bytes=257 * 1024 * 1024
        ),
    }


async def test_bad_images_are_refused_by_reason_and_the_good_one_is_encoded(
    stub: "VaeServiceAsyncStub", upload: Upload, picture: Picture, save: Save,
    bad_images: dict[int, ObjectRef],
) -> None:  # fmt: skip
    good = upload(save(picture(seed=54), "PNG"))
    answers = await encode(stub, [planned(image) for image in (*bad_images.values(), good)])
    assert [answer.rejection.reason for answer in answers[:-1]] == list(bad_images)
    assert all(answer.rejection.message for answer in answers[:-1])
    assert answers[-1].WhichOneof("outcome") == "moments"


async def test_inspection_refuses_bad_images_by_reason_also_the_second_time(
    stub: "VaeServiceAsyncStub", bad_images: dict[int, ObjectRef]
) -> None:
    # A reference whose size is a lie is one to other bytes; only encoding would find the file too large first.
    expected = {**bad_images}
    expected.pop(vae_pb2.REJECTION_REASON_TOO_MANY_BYTES)
    for _ in range(2):
        answers = await inspect(stub, list(expected.values()))
        assert [answer.rejection.reason for answer in answers] == list(expected)


async def test_inspection_sees_what_a_person_sees(
    stub: "VaeServiceAsyncStub", upload: Upload, picture: Picture, save: Save
) -> None:
    rotated = Image.Exif()
    rotated[0x0112] = 6
    files = [save(picture(seed=60), "JPEG", exif=rotated), save(picture(seed=61), "PNG")]
    images = [upload(file) for file in files]
    first, second = [await inspect(stub, images) for _ in range(2)]
    found = [(answer.image.width, answer.image.height, answer.image.format) for answer in first]
    assert found == [(128, 160, "JPEG"), (160, 128, "PNG")]
    assert first == second


async def test_a_lower_limit_holds_for_what_was_inspected_before(
    stub: "VaeServiceAsyncStub", upload: Upload, picture: Picture, save: Save, module_s3_store: S3Store,
    vae_settings: VaeSettings,
) -> None:  # fmt: skip
    images = [upload(save(picture(seed=70), "PNG"))]
    await inspect(stub, images)
    settings = vae_settings.model_copy(update={"max_pixels": 1000})
    stricter = VaeService(settings, module_s3_store)
    async with (
        Server([stricter.served], settings, load=stricter.load, stop=stricter.close) as server,
        connect(server.target) as channel,
    ):
        answers = await inspect(VaeServiceStub(channel), images)
    assert answers[0].rejection.reason == vae_pb2.REJECTION_REASON_TOO_MANY_PIXELS
    assert "20480 pixels, the limit is 1000" in answers[0].rejection.message


async def test_every_wrong_field_is_named_at_once(
    stub: "VaeServiceAsyncStub", upload: Upload, picture: Picture, save: Save
) -> None:
    image = upload(save(picture(seed=80), "PNG"))
    elsewhere = ObjectRef(uri="s3://elsewhere/x", sha256="ABC")
    outside = ResizeCrop(resize_width=100, resize_height=64, crop_left=40, crop_top=0, width=64, height=0)
    with pytest.raises(InvalidArgumentError) as refusal, translated():
        await encode(stub, [planned(image), planned(elsewhere), planned(image, outside)])
    assert [violation.field for violation in refusal.value.violations] == [
        "images[1].image.uri",
        "images[1].image.sha256",
        "images[2].height",
        "images[2].crop_left",
    ]
    with pytest.raises(InvalidArgumentError) as empty, translated():
        await inspect(stub, [])
    assert [violation.field for violation in empty.value.violations] == ["images"]


async def test_a_caller_that_hangs_up_leaves_the_service_working(
    stub: "VaeServiceAsyncStub", upload: Upload, picture: Picture, save: Save
) -> None:
    plans = [planned(upload(save(picture(64, 64, seed), "PNG"))) for seed in range(90, 110)]
    call: Any = stub.EncodeImages(vae_pb2.EncodeImagesRequest(images=plans))
    await anext(aiter(call))
    call.cancel()
    answers = await encode(stub, [planned(upload(save(picture(seed=111), "PNG")))])
    assert not answers[0].cached


async def test_a_store_that_is_gone_is_unavailable_and_not_the_images_fault(
    picture: Picture, save: Save, tmp_path: Path, vae_settings: VaeSettings
) -> None:
    seaweed = Seaweed(tmp_path)
    seaweed.start()
    store = seaweed.open_store(retry_seconds=0.0)
    service = VaeService(vae_settings, store)
    body = save(picture(), "PNG")
    sha256 = hashlib.sha256(body).hexdigest()
    store.create(image_key(sha256), body)
    image = ObjectRef(uri=store.uri(image_key(sha256)), sha256=sha256)
    try:
        async with (
            Server([service.served], vae_settings, load=service.load, stop=service.close) as server,
            connect(server.target, retries=False) as channel,
        ):
            stub = VaeServiceStub(channel)
            await asyncio.to_thread(seaweed.stop)
            refusals = []
            for ask in (encode(stub, [planned(image)]), inspect(stub, [image])):
                refusals.append(await _refusal(ask))
    finally:
        await asyncio.to_thread(seaweed.stop)
    assert [refusal.reason for refusal in refusals] == ["STORE_UNAVAILABLE", "STORE_UNAVAILABLE"]


async def _refusal(ask: Awaitable[object]) -> UnavailableError:
    with pytest.raises(UnavailableError) as refusal, translated():
        await ask
    return refusal.value
