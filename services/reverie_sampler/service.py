"""The sampler service put together: settings in, something to serve out."""

import asyncio

import grpc
from reverie.encoder.v1.encoder_pb2_grpc import EncoderServiceStub
from reverie.sampling.v1.sampling_pb2_grpc import add_SamplingServiceServicer_to_server
from reverie.vae.v1.vae_pb2_grpc import VaeServiceStub
from reverie_common.rpc.channel import connect
from reverie_common.rpc.server import ServedService
from reverie_common.storage import ObjectStore
from reverie_hidream.checkpoint import resolve_checkpoint

from reverie_sampler.engine import PARTS, SamplerEngine, load_engine
from reverie_sampler.metrics import MODEL_LOAD_SECONDS, PARKED
from reverie_sampler.pictures import Pictures
from reverie_sampler.scores import Scores
from reverie_sampler.servicer import SamplerServicer
from reverie_sampler.settings import SamplerSettings
from reverie_sampler.texts import Texts


class SamplerService:
    """What `run_server` and the tests serve. Belongs to one event loop.

    Args:
        settings: Which model, where, and whom to ask.
        store: Where adapters, embeddings and pictures are, and checkpoints at s3:// are read from.
    """

    def __init__(self, settings: SamplerSettings, store: ObjectStore) -> None:
        self._settings = settings
        self._store = store
        self._servicer = SamplerServicer(store)
        self._pictures: Pictures | None = None
        self._channels: list[grpc.aio.Channel] = []
        self.served = ServedService(
            name="reverie.sampling.v1.SamplingService",
            add_to_server=add_SamplingServiceServicer_to_server,
            servicer=self._servicer,
        )

    async def load(self) -> None:
        """Check the store, load the transformer, begin to answer. Encoders and VAE may come later.

        Raises:
            ReverieError: the store or the checkpoint cannot be used; the message has the remedy.
        """
        await asyncio.to_thread(self._store.check)
        engine = await asyncio.to_thread(load_sampler_engine, self._settings, self._store)
        self._pictures = self._make_pictures(engine)
        self._servicer.serve(self._pictures)

    async def close(self) -> None:
        """Finish what runs. Safe to repeat, and before load."""
        if self._pictures is not None:
            await asyncio.to_thread(self._pictures.close)
        for channel in self._channels:
            await channel.close()

    def _make_pictures(self, engine: SamplerEngine) -> Pictures:
        settings = self._settings
        texts = Texts(
            [EncoderServiceStub(self._channel(address)) for address in settings.encoders],
            self._store,
            capacity=settings.max_texts,
            patience_seconds=settings.patience_seconds,
        )
        return Pictures(
            engine=engine,
            store=self._store,
            texts=texts,
            vae=VaeServiceStub(self._channel(settings.vae)),
            scores=Scores(
                location=settings.clip_model,
                device=settings.clip_device,
                cache_dir=settings.cache_dir,
                store=self._store,
            ),
            max_waiting=settings.max_waiting,
            patience_seconds=settings.patience_seconds,
        )

    def _channel(self, address: str) -> grpc.aio.Channel:
        channel = connect(address)
        self._channels.append(channel)
        return channel


def load_sampler_engine(settings: SamplerSettings, store: ObjectStore) -> SamplerEngine:
    """Find the checkpoint and load its transformer. Blocks.

    Raises:
        NotFoundError: the checkpoint, or a part of it, is missing.
    """
    checkpoint = resolve_checkpoint(settings.checkpoint, store=store, cache_dir=settings.cache_dir, parts=PARTS)
    engine, seconds = load_engine(
        checkpoint,
        device=settings.device,
        dtype=settings.dtype,
        precision=settings.precision,
        num_threads=settings.num_threads,
        max_adapters=settings.max_adapters,
        compile_backend=settings.compile_backend,
        idle_seconds=settings.idle_seconds,
        on_parked=PARKED.set,
    )
    MODEL_LOAD_SECONDS.set(seconds)
    return engine
