"""Latents that are made once, and pictures from latents.

A latent's key is everything it depends on: the image's bytes, the plan, the VAE and the version of the pixel code.
"""

import asyncio
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import torch
from PIL import Image
from reverie.common.v1.common_pb2 import ObjectRef, TensorRef
from reverie_common.concurrency import BatchLimits, MicroBatcher
from reverie_common.storage import ObjectStore, RawTensor, get_tensor, put_object, put_tensor
from reverie_common.storage.derived import DerivedTensor, DerivedTensors
from reverie_common.storage.keys import JSON, content_digest, latent_key, sample_key

from reverie_vae.engine import VaeEngine, VaeFacts
from reverie_vae.files import ImageFile, ImageSources, fetch_image
from reverie_vae.images import TRANSFORM_VERSION, ResizeCrop, read_pixels
from reverie_vae.metrics import LATENTS, STAGE_SECONDS, BatchMetrics

TENSOR_NAME = "moments"

# Decoding is one call at a time; the queue only keeps a burst of sampling runs from being refused.
_DECODE_LIMITS = BatchLimits(max_batch_size=1, window_seconds=0.0, max_waiting=64, max_held=2)


class Latents:
    """The VAE's work for all callers. Belongs to one event loop.

    Args:
        engine: The loaded VAE; gets a thread of its own.
        store: Where latents go.
        sources: Where images are.
        decoders: Where files are fetched, decoded and resized, and PNG files are written.
        max_pixels: Images over this many pixels are rejected.
        limits: Of the encoding batches and their queue.
    """

    def __init__(
        self,
        *,
        engine: VaeEngine,
        store: ObjectStore,
        sources: ImageSources,
        decoders: ThreadPoolExecutor,
        max_pixels: int,
        limits: BatchLimits,
    ) -> None:
        self._engine = engine
        self._store = store
        self._sources = sources
        self._decoders = decoders
        self._max_pixels = max_pixels
        self._derived = DerivedTensors(store)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vae")
        self._encoding: MicroBatcher[torch.Tensor, RawTensor] = MicroBatcher(
            engine.encode,
            executor=self._thread,
            limits=limits,
            observer=BatchMetrics("encode"),
            group_of=lambda pixels: tuple(pixels.shape),
        )
        self._decoding: MicroBatcher[RawTensor, list[np.ndarray]] = MicroBatcher(
            self._decode, executor=self._thread, limits=_DECODE_LIMITS, observer=BatchMetrics("decode")
        )

    @property
    def facts(self) -> VaeFacts:
        """The VAE of this process."""
        return self._engine.facts

    @property
    def max_pixels(self) -> int:
        """Images over this many pixels are rejected."""
        return self._max_pixels

    def start(self) -> None:
        """Begin to serve, on the running event loop."""
        self._encoding.start()
        self._decoding.start()

    async def close(self) -> None:
        """Refuse what waits, finish what runs. Safe to repeat."""
        await asyncio.gather(self._encoding.close(), self._decoding.close())
        self._thread.shutdown()
        await asyncio.to_thread(self._engine.close)

    async def release(self) -> bool:
        """Move the VAE to host memory if it is idle; returns whether it is there. Safe to repeat."""
        return await asyncio.to_thread(self._engine.release)

    async def encode(self, file: ImageFile, plan: ResizeCrop) -> DerivedTensor:
        """Refer to the posterior of one image under one plan, making it if the store has none. Safe to repeat.

        Raises:
            ImageRejectedError: the file cannot be used.
            ResourceExhaustedError: the queue is full.
            StoreUnavailableError, StoreFullError: the store cannot be read or written.
        """
        key = moments_key(self.facts.fingerprint, file.sha256, plan)
        derived = await self._derived.get(key, lambda: self._make(file, plan, key))
        LATENTS.labels("cached" if derived.cached else "computed").inc()
        return derived

    async def decode(self, latents: TensorRef) -> list[ObjectRef]:
        """Write one PNG for each of (N, 16, h, w) scaled latents, in order. Safe to repeat.

        Raises:
            ObjectNotFoundError, IntegrityError: the latents are not in the store, or damaged.
            InvalidArgumentError: they hold NaN or infinity.
        """
        raw = await asyncio.to_thread(get_tensor, self._store, latents)
        loop = asyncio.get_running_loop()
        async with self._decoding.submit(raw) as pictures:
            keys = [picture_key(latents.sha256, index, self.facts.fingerprint) for index in range(len(pictures))]
            writes = [
                loop.run_in_executor(self._decoders, put_png, self._store, key, picture)
                for key, picture in zip(keys, pictures, strict=True)
            ]
            return list(await asyncio.gather(*writes))

    async def _make(self, file: ImageFile, plan: ResizeCrop, key: str) -> TensorRef:
        pixels = await asyncio.get_running_loop().run_in_executor(self._decoders, self._read, file, plan)
        async with self._encoding.submit(pixels) as moments:
            with STAGE_SECONDS.labels("store").time():
                return await asyncio.to_thread(put_tensor, self._store, key, TENSOR_NAME, moments, compressed=False)

    def _read(self, file: ImageFile, plan: ResizeCrop) -> torch.Tensor:
        with STAGE_SECONDS.labels("read").time():
            return read_pixels(fetch_image(self._sources.store_of(file), file), plan, max_pixels=self._max_pixels)

    def _decode(self, batch: Sequence[RawTensor]) -> list[list[np.ndarray]]:
        return [self._engine.decode(latents) for latents in batch]


def put_png(store: ObjectStore, key: str, picture: np.ndarray) -> ObjectRef:
    """Write a picture (H, W, 3) uint8 as a PNG. Blocks."""
    with STAGE_SECONDS.labels("png").time():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
    return put_object(store, key, file.getvalue(), "image/png")


def moments_key(vae_fingerprint: str, image_sha256: str, plan: ResizeCrop) -> str:
    """Key of one image's posterior under one plan."""
    record: dict[str, JSON] = {"image": image_sha256, "plan": asdict(plan), "transform": TRANSFORM_VERSION}
    return latent_key(vae_fingerprint, content_digest(record))


def picture_key(latents_sha256: str, index: int, decoder_fingerprint: str) -> str:
    """Key of the picture of one latent of a tensor object, as one decoder makes it."""
    return sample_key(content_digest({"latents": latents_sha256, "index": index, "vae": decoder_fingerprint}))
