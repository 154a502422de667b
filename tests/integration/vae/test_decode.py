"""DecodeLatents and DescribeVae over real gRPC and a real store, against the VAE called directly."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from reverie.common.v1.common_pb2 import ObjectRef, TensorRef
from reverie.vae.v1 import vae_pb2
from reverie_common.errors import InvalidArgumentError, NotFoundError
from reverie_common.rpc.channel import translated
from reverie_common.storage import S3Store, get_object, put_tensor
from reverie_hidream.tensor_io import to_raw
from reverie_hidream.vae import load_vae
from reverie_vae.settings import VaeSettings

if TYPE_CHECKING:
    from reverie.vae.v1.vae_pb2_grpc import VaeServiceAsyncStub

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def decode(stub: "VaeServiceAsyncStub", latents: TensorRef) -> Sequence[ObjectRef]:
    """The pictures' references."""
    response = await stub.DecodeLatents(vae_pb2.DecodeLatentsRequest(latents=latents))
    return response.images


def stored(store: S3Store, name: str, latents: torch.Tensor) -> TensorRef:
    """Put latents into the store."""
    return put_tensor(store, f"v1/test/{name}", "latents", to_raw(latents), compressed=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_pictures_equal_the_vae_called_directly(
    stub: "VaeServiceAsyncStub", module_s3_store: S3Store, tiny_checkpoint: Path, dtype: torch.dtype
) -> None:
    latents = torch.randn(3, 16, 8, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    images = await decode(stub, stored(module_s3_store, str(dtype), latents))
    direct = load_vae(tiny_checkpoint, dtype=torch.float32).decode(latents).numpy()
    for image, expected in zip(images, direct, strict=True):
        png = Image.open(io.BytesIO(get_object(module_s3_store, image)))
        assert (image.media_type, png.format, png.size) == ("image/png", "PNG", (96, 64))
        assert np.array_equal(np.asarray(png), expected)


async def test_the_same_latents_give_the_same_objects(stub: "VaeServiceAsyncStub", module_s3_store: S3Store) -> None:
    latents = stored(module_s3_store, "again", torch.zeros(2, 16, 8, 8))
    first, second = await decode(stub, latents), await decode(stub, latents)
    assert first == second
    assert first[0].uri != first[1].uri


@pytest.mark.parametrize("shape", [(16, 8, 8), (17, 16, 8, 8), (1, 4, 8, 8), (1, 16, 0, 8), (1, 16, 1024, 1024)])
async def test_refuses_other_shapes(
    stub: "VaeServiceAsyncStub", module_s3_store: S3Store, shape: tuple[int, ...]
) -> None:
    latents = TensorRef(uri=module_s3_store.uri("v1/test/x"), name="x", dtype="F32", shape=shape, sha256="0" * 64)
    with pytest.raises(InvalidArgumentError) as refusal, translated():
        await decode(stub, latents)
    assert [violation.field for violation in refusal.value.violations] == ["latents.shape"]


async def test_every_wrong_field_is_named_at_once(stub: "VaeServiceAsyncStub") -> None:
    with pytest.raises(InvalidArgumentError) as refusal, translated():
        await decode(stub, TensorRef(uri="file:///etc/passwd", dtype="I8", shape=[1]))
    fields = [violation.field for violation in refusal.value.violations]
    assert fields == ["latents.uri", "latents.sha256", "latents.dtype", "latents.shape"]


async def test_refuses_latents_of_a_diverged_run(stub: "VaeServiceAsyncStub", module_s3_store: S3Store) -> None:
    latents = stored(module_s3_store, "nan", torch.full((1, 16, 8, 8), float("nan")))
    with pytest.raises(InvalidArgumentError) as refusal, translated():
        await decode(stub, latents)
    assert refusal.value.reason == "NON_FINITE_LATENTS"


async def test_latents_that_are_not_there_are_not_found(stub: "VaeServiceAsyncStub", module_s3_store: S3Store) -> None:
    latents = stored(module_s3_store, "gone", torch.ones(1, 16, 8, 8))
    module_s3_store.delete(module_s3_store.key_of(latents.uri))
    with pytest.raises(NotFoundError) as refusal, translated():
        await decode(stub, latents)
    assert refusal.value.reason == "OBJECT_NOT_FOUND"


async def test_describes_what_it_holds(
    stub: "VaeServiceAsyncStub", tiny_checkpoint: Path, vae_settings: VaeSettings
) -> None:
    described = await stub.DescribeVae(vae_pb2.DescribeVaeRequest())
    direct = load_vae(tiny_checkpoint, dtype=torch.float32)
    assert described.fingerprint == direct.fingerprint
    assert (described.device, described.dtype) == ("cpu", "float32")
    assert described.max_pixels == vae_settings.max_pixels
    assert (described.scaling_factor, described.shift_factor) == (0.3611, 0.1159)
