"""The VAE service put together: settings in, something to serve out."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reverie.vae.v1.vae_pb2_grpc import add_VaeServiceServicer_to_server
from reverie_common.rpc.server import ServedService
from reverie_common.storage import ObjectStore
from reverie_hidream.checkpoint import resolve_checkpoint
from reverie_hidream.tiny_decoder import PART as PREVIEW_PART

from reverie_vae.engine import VaeEngine, load_engine
from reverie_vae.files import ImageSources
from reverie_vae.inspections import Inspections
from reverie_vae.latents import Latents
from reverie_vae.masks import Masks
from reverie_vae.metrics import MODEL_LOAD_SECONDS, PARKED
from reverie_vae.previews import Previews, find_decoder
from reverie_vae.servicer import VaeDomain, VaeServicer
from reverie_vae.settings import VaeSettings


class VaeService:
    """What `run_server` and the tests serve. Belongs to one event loop.

    Args:
        settings: Which VAE, where and how.
        store: Where images, latents and pictures are, and checkpoints at s3:// are read from.
    """

    def __init__(self, settings: VaeSettings, store: ObjectStore) -> None:
        self._settings = settings
        self._store = store
        self._servicer = VaeServicer(max_in_flight=settings.max_in_flight)
        self._decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._latents: Latents | None = None
        self._previews: Previews | None = None
        self.served = ServedService(
            name="reverie.vae.v1.VaeService",
            add_to_server=add_VaeServiceServicer_to_server,
            servicer=self._servicer,
        )

    async def load(self) -> None:
        """Check the store, load the VAE, begin to answer.

        Raises:
            ReverieError: the store or the checkpoint cannot be used; the message has the remedy.
        """
        await asyncio.to_thread(self._store.check)
        settings = self._settings
        checkpoint = await asyncio.to_thread(_resolve, settings, self._store)
        engine = await asyncio.to_thread(load_vae_engine, settings, checkpoint)
        sources = ImageSources(self._store, settings.source_buckets)
        self._latents = Latents(
            engine=engine,
            store=self._store,
            sources=sources,
            decoders=self._decoders,
            max_pixels=settings.max_pixels,
            limits=settings.batch_limits(),
        )
        self._latents.start()
        inspections = Inspections(
            store=self._store, sources=sources, decoders=self._decoders, max_pixels=settings.max_pixels
        )
        masks = Masks(
            store=self._store,
            sources=sources,
            decoders=self._decoders,
            max_pixels=settings.max_pixels,
            downsampling=engine.facts.downsampling,
        )
        self._previews = Previews(
            location=find_decoder(settings.preview_decoder, checkpoint),
            cache_dir=settings.cache_dir,
            store=self._store,
            decoders=self._decoders,
            facts=engine.facts,
        )
        self._servicer.serve(
            VaeDomain(
                inspections=inspections,
                latents=self._latents,
                masks=masks,
                previews=self._previews,
                key_of=self._store.key_of,
                locate=sources.locate,
            )
        )

    async def close(self) -> None:
        """Finish what runs. Safe to repeat, and before load."""
        if self._latents is not None:
            await self._latents.close()
        if self._previews is not None:
            await self._previews.close()
        self._decoders.shutdown(cancel_futures=True)


def load_vae_engine(settings: VaeSettings, checkpoint: Path) -> VaeEngine:
    """Load the VAE of a local checkpoint. Blocks.

    Raises:
        NotFoundError: the checkpoint has no vae/.
    """
    engine, seconds = load_engine(
        checkpoint,
        device=settings.device,
        dtype=settings.dtype,
        num_threads=settings.num_threads,
        idle_seconds=settings.idle_seconds,
        on_parked=PARKED.set,
    )
    MODEL_LOAD_SECONDS.set(seconds)
    return engine


def _resolve(settings: VaeSettings, store: ObjectStore) -> Path:
    parts = ["vae", PREVIEW_PART]
    return resolve_checkpoint(settings.checkpoint, store=store, cache_dir=settings.cache_dir, parts=parts)
