"""PreviewLatents over real gRPC and a real store, against diffusers' AutoencoderTiny called directly."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from reverie.common.v1.common_pb2 import TensorRef
from reverie.vae.v1 import vae_pb2
from reverie.vae.v1.vae_pb2_grpc import VaeServiceStub
from reverie_common.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from reverie_common.rpc.channel import connect, translated
from reverie_common.rpc.server import Server
from reverie_common.storage import S3Store, get_object, put_tensor
from reverie_hidream.tensor_io import to_raw
from reverie_vae.previews import find_decoder
from reverie_vae.service import VaeService
from reverie_vae.settings import VaeSettings

if TYPE_CHECKING:
    from reverie.vae.v1.vae_pb2_grpc import VaeServiceAsyncStub

pytestmark = pytest.mark.asyncio(loop_scope="module")


def stored(store: S3Store, name: str, latents: torch.Tensor) -> vae_pb2.PreviewLatentsRequest:
    ref = put_tensor(store, f"v1/test/preview-{name}", "latents", to_raw(latents), compressed=False)
    return vae_pb2.PreviewLatentsRequest(latents=ref)


def directly(checkpoint: Path, latents: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """0 to 1, (B, H, W, 3): output / 2 + 0.5, cut off, as taef1's users do it."""
    model = AutoencoderTiny.from_pretrained(checkpoint / "vae_preview", dtype=torch.float32)
    with torch.no_grad():
        decoded = model.decode(latents).sample
    levels: np.ndarray[Any, np.dtype[np.float64]] = decoded.numpy().astype(np.float64) / 2 + 0.5
    return levels.clip(0, 1).transpose(0, 2, 3, 1)


async def test_previews_equal_the_tiny_decoder_called_directly(
    stub: "VaeServiceAsyncStub", module_s3_store: S3Store, tiny_checkpoint: Path
) -> None:
    latents = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    answer = await stub.PreviewLatents(stored(module_s3_store, "direct", latents))
    for image, expected in zip(answer.images, directly(tiny_checkpoint, latents), strict=True):
        png = Image.open(io.BytesIO(get_object(module_s3_store, image)))
        assert (image.media_type, png.format, png.size) == ("image/png", "PNG", (96, 64))
        assert np.abs(np.asarray(png) / 255 - expected).max() <= 0.51 / 255


async def test_a_large_preview_is_halved_by_means(
    stub: "VaeServiceAsyncStub", module_s3_store: S3Store, tiny_checkpoint: Path
) -> None:
    latents = torch.randn(1, 16, 8, 72, generator=torch.Generator().manual_seed(1))
    answer = await stub.PreviewLatents(stored(module_s3_store, "large", latents))
    png = Image.open(io.BytesIO(get_object(module_s3_store, answer.images[0])))
    expected = directly(tiny_checkpoint, latents)[0].reshape(32, 2, 288, 2, 3).mean(axis=(1, 3))
    assert png.size == (288, 32)
    assert np.abs(np.asarray(png) / 255 - expected).max() <= 0.51 / 255


async def test_a_preview_is_not_the_picture(stub: "VaeServiceAsyncStub", module_s3_store: S3Store) -> None:
    request = stored(module_s3_store, "other", torch.ones(1, 16, 8, 8))
    preview = await stub.PreviewLatents(request)
    picture = await stub.DecodeLatents(vae_pb2.DecodeLatentsRequest(latents=request.latents))
    assert preview.images[0].uri != picture.images[0].uri


async def test_the_decoder_is_described(stub: "VaeServiceAsyncStub", tiny_checkpoint: Path) -> None:
    described = await stub.DescribeVae(vae_pb2.DescribeVaeRequest())
    assert described.preview_decoder == str(tiny_checkpoint / "vae_preview")
    assert len(described.preview_fingerprint) == 64
    assert described.preview_fingerprint != described.fingerprint


async def test_refuses_other_shapes(stub: "VaeServiceAsyncStub", module_s3_store: S3Store) -> None:
    latents = TensorRef(uri=module_s3_store.uri("v1/test/x"), name="x", dtype="F32", shape=[4], sha256="0" * 64)
    with pytest.raises(InvalidArgumentError) as refusal, translated():
        await stub.PreviewLatents(vae_pb2.PreviewLatentsRequest(latents=latents))
    assert [violation.field for violation in refusal.value.violations] == ["latents.shape"]


async def test_a_service_without_a_decoder_says_so(vae_settings: VaeSettings, module_s3_store: S3Store) -> None:
    settings = vae_settings.model_copy(update={"preview_decoder": "none"})
    service = VaeService(settings, module_s3_store)
    async with (
        Server([service.served], settings, load=service.load, stop=service.close) as server,
        connect(server.target) as channel,
    ):
        stub = VaeServiceStub(channel)
        described = await stub.DescribeVae(vae_pb2.DescribeVaeRequest())
        assert (described.preview_decoder, described.preview_fingerprint) == ("", "")
        with pytest.raises(FailedPreconditionError, match="--preview-decoder"), translated():
            await stub.PreviewLatents(stored(module_s3_store, "none", torch.zeros(1, 16, 8, 8)))


async def test_the_released_checkpoint_s_decoder_is_taef1(tmp_path: Path, tiny_checkpoint: Path) -> None:
    assert find_decoder("", tmp_path) == "madebyollin/taef1"
    assert find_decoder("", tiny_checkpoint) == str(tiny_checkpoint / "vae_preview")
    with pytest.raises(NotFoundError, match="no tiny decoder"):
        find_decoder(str(tmp_path), tiny_checkpoint)
