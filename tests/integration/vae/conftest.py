"""A VAE service with the tiny checkpoint on a real store, and pictures in that store, for the tests of a module."""

import hashlib
import io
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image
from reverie.common.v1.common_pb2 import ObjectRef
from reverie.vae.v1.vae_pb2_grpc import VaeServiceStub
from reverie_common.rpc.channel import connect
from reverie_common.rpc.server import Server
from reverie_common.storage import S3Store
from reverie_common.storage.keys import image_key
from reverie_vae.service import VaeService
from reverie_vae.settings import VaeSettings

if TYPE_CHECKING:
    from reverie.vae.v1.vae_pb2_grpc import VaeServiceAsyncStub

Upload = Callable[[bytes], ObjectRef]
Picture = Callable[..., Image.Image]


@pytest.fixture(scope="module")
def vae_settings(tiny_checkpoint: Path) -> VaeSettings:
    """Settings of the module's service: float32, and a pixel limit that small pictures can exceed."""
    return VaeSettings(checkpoint=str(tiny_checkpoint), dtype="float32", max_pixels=250_000, port=0, metrics_port=0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stub(vae_settings: VaeSettings, module_s3_store: S3Store) -> AsyncIterator["VaeServiceAsyncStub"]:
    """A stub of the module's service."""
    service = VaeService(vae_settings, module_s3_store)
    async with (
        Server([service.served], vae_settings, load=service.load, stop=service.close) as server,
        connect(server.target) as channel,
    ):
        yield VaeServiceStub(channel)


@pytest.fixture(scope="module")
def upload(module_s3_store: S3Store) -> Upload:
    """Puts a file into the module's store and refers to it."""

    def put(body: bytes) -> ObjectRef:
        sha256 = hashlib.sha256(body).hexdigest()
        module_s3_store.create(image_key(sha256), body)
        return ObjectRef(uri=module_s3_store.uri(image_key(sha256)), size_bytes=len(body), sha256=sha256)

    return put


@pytest.fixture(scope="session")
def picture() -> Picture:
    """Draws smooth random pictures; another seed is another picture."""

    def draw(width: int = 160, height: int = 128, seed: int = 0) -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    return draw


@pytest.fixture(scope="session")
def save() -> Callable[..., bytes]:
    """Writes a picture as a file of some format."""

    def write(image: Image.Image, format_name: str, **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, format_name, **options)
        return file.getvalue()

    return write
