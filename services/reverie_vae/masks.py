"""Masks that are made once: brought to their image's bucket, then down to latent size (spec 3.6).

A mask's key is everything that it depends on: its bytes, the plan of its image and the versions of the code. No model
takes part. H x W pixels, h x w latent pixels.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch
from reverie.common.v1.common_pb2 import TensorRef
from reverie_common.storage import ObjectStore, RawTensor, put_tensor
from reverie_common.storage.derived import DerivedTensor, DerivedTensors
from reverie_common.storage.keys import JSON, content_digest, mask_key
from reverie_hidream.tensor_io import to_raw

from reverie_vae.files import ImageFile, ImageSources, fetch_image
from reverie_vae.images import TRANSFORM_VERSION, ResizeCrop, read_pixels, read_size
from reverie_vae.metrics import STAGE_SECONDS
from reverie_vae.rejections import ImageRejectedError, Reason

TENSOR_NAME = "mask"

MASK_VERSION = 1
"""Part of every mask's key, beside the version of the pixel code. Raise it when a value of `shrink_mask` changes."""

# Sizes are whole pixels, so that a mask at another scale is never of quite the same proportions.
_TOLERANCE = 0.02


class Masks:
    """Masks for all callers. Belongs to one event loop.

    Args:
        store: Where masks go.
        sources: Where mask files are.
        decoders: Where files are fetched, decoded and resized.
        max_pixels: Mask files over this many pixels are rejected.
        downsampling: Pixels per latent pixel in each direction.
    """

    def __init__(
        self,
        *,
        store: ObjectStore,
        sources: ImageSources,
        decoders: ThreadPoolExecutor,
        max_pixels: int,
        downsampling: int,
    ) -> None:
        self._store = store
        self._sources = sources
        self._decoders = decoders
        self._max_pixels = max_pixels
        self._downsampling = downsampling
        self._derived = DerivedTensors(store)

    async def encode(self, file: ImageFile, plan: ResizeCrop) -> DerivedTensor:
        """Refer to one mask under the plan of its image, making it if the store has none. Safe to repeat.

        Raises:
            ImageRejectedError: the file cannot be used.
            StoreUnavailableError, StoreFullError: the store cannot be read or written.
        """
        record: dict[str, JSON] = {
            "mask": file.sha256,
            "plan": asdict(plan),
            "transform": TRANSFORM_VERSION,
            "version": MASK_VERSION,
            "downsampling": self._downsampling,
        }
        key = mask_key(content_digest(record))
        return await self._derived.get(key, lambda: self._make(file, plan, key))

    async def _make(self, file: ImageFile, plan: ResizeCrop, key: str) -> TensorRef:
        mask = await asyncio.get_running_loop().run_in_executor(self._decoders, self._read, file, plan)
        return await asyncio.to_thread(put_tensor, self._store, key, TENSOR_NAME, mask, compressed=True)

    def _read(self, file: ImageFile, plan: ResizeCrop) -> RawTensor:
        with STAGE_SECONDS.labels("read").time():
            body = fetch_image(self._sources.store_of(file), file)
            refuse_other_proportions(read_size(body, max_pixels=self._max_pixels), plan)
            pixels = read_pixels(body, plan, max_pixels=self._max_pixels)
            return to_raw(shrink_mask(pixels, self._downsampling))


def shrink_mask(pixels: torch.Tensor, downsampling: int) -> torch.Tensor:
    """Average a mask over its channels and over each area that is one latent pixel.

    Args:
        pixels: (3, H, W) uint8; H and W are multiples of `downsampling`.
        downsampling: Pixels per latent pixel in each direction.

    Returns:
        (1, h, w) float32, 0 to 1.
    """
    grey = pixels.to(torch.float32).mean(dim=0, keepdim=True) / 255.0
    return torch.nn.functional.avg_pool2d(grey, downsampling)


def refuse_other_proportions(size: tuple[int, int], plan: ResizeCrop) -> None:
    """Raise ImageRejectedError if a mask of (width, height) does not lie over the image that a plan was made for."""
    width, height = size
    aspect, expected = width / height, plan.resize_width / plan.resize_height
    if abs(aspect / expected - 1) > max(_TOLERANCE, 1.5 / min(width, height)):
        raise ImageRejectedError(
            Reason.OTHER_PROPORTIONS,
            f"{width}x{height} has the aspect {aspect:.3f}, its image has {expected:.3f}; make the mask of the image's "
            "own size, or of the same proportions",
        )
