"""The encoder service put together: settings in, something to serve out."""

import asyncio
from pathlib import Path

from reverie.encoder.v1.encoder_pb2_grpc import add_EncoderServiceServicer_to_server
from reverie_common.rpc.server import ServedService
from reverie_common.storage import ObjectStore
from reverie_hidream.checkpoint import require_parts, resolve_checkpoint, resolve_llama

from reverie_encoder.embeddings import Embeddings
from reverie_encoder.engine import EncoderEngine, EncoderPlan, load_engine
from reverie_encoder.metrics import MODEL_LOAD_SECONDS, PARKED
from reverie_encoder.servicer import EncoderServicer
from reverie_encoder.settings import EncoderSettings

# Sub-folders of a checkpoint that each encoder needs; Llama's are resolve_llama's business.
_PARTS = {
    "clip_l": ("text_encoder", "tokenizer"),
    "clip_g": ("text_encoder_2", "tokenizer_2"),
    "t5": ("text_encoder_3", "tokenizer_3"),
    "llama": ("text_encoder_4", "tokenizer_4"),
}


class EncoderService:
    """What `run_server` and the tests serve. Belongs to one event loop.

    Args:
        settings: Which encoders, where and how.
        store: Where embeddings are kept, and checkpoints at s3:// are read from.
    """

    def __init__(self, settings: EncoderSettings, store: ObjectStore) -> None:
        self._settings = settings
        self._store = store
        self._servicer = EncoderServicer(max_in_flight=settings.max_in_flight)
        self._embeddings: Embeddings | None = None
        self.served = ServedService(
            name="reverie.encoder.v1.EncoderService",
            add_to_server=add_EncoderServiceServicer_to_server,
            servicer=self._servicer,
        )

    async def load(self) -> None:
        """Check the store, load the encoders, begin to answer.

        Raises:
            ReverieError: the store or the checkpoint cannot be used; the message has the remedy.
        """
        await asyncio.to_thread(self._store.check)
        engine = await asyncio.to_thread(load_encoders, self._settings, self._store)
        self._embeddings = Embeddings(
            engine=engine,
            store=self._store,
            limits=self._settings.batch_limits(),
            max_on_demand=self._settings.on_demand_objects,
        )
        await self._embeddings.start()
        self._servicer.serve(self._embeddings)

    async def close(self) -> None:
        """Finish what runs. Safe to repeat, and before load."""
        if self._embeddings is not None:
            await self._embeddings.close()


def load_encoders(settings: EncoderSettings, store: ObjectStore) -> EncoderEngine:
    """Find the checkpoint and load the encoders that the settings name. Blocks.

    Raises:
        NotFoundError: the checkpoint lacks a part; found for all encoders before any is loaded.
    """
    directories = _resolve(settings, store)
    plans = [
        EncoderPlan(
            name=name,
            checkpoint=directories[name],
            device=settings.device_of(name),
            dtype=settings.dtype,
            precision=settings.precision_of(name),
        )
        for name in settings.encoders
    ]
    return load_engine(
        plans,
        num_threads=settings.num_threads,
        on_loaded=lambda name, seconds: MODEL_LOAD_SECONDS.labels(name).set(seconds),
        idle_seconds=settings.idle_seconds,
        on_parked=lambda name, is_parked: PARKED.labels(name).set(is_parked),
    )


def _resolve(settings: EncoderSettings, store: ObjectStore) -> dict[str, Path]:
    own_llama = settings.llama_checkpoint is not None
    wanted = [name for name in settings.encoders if not (own_llama and name == "llama")]
    parts = [part for name in wanted for part in _PARTS[name]]
    checkpoint = resolve_checkpoint(settings.checkpoint, store=store, cache_dir=settings.cache_dir, parts=parts)
    require_parts(checkpoint, [part for name in wanted if name != "llama" for part in _PARTS[name]])
    directories = dict.fromkeys(settings.encoders, checkpoint)
    if "llama" in directories:
        location = settings.llama_checkpoint
        directories["llama"] = resolve_llama(checkpoint, location, store=store, cache_dir=settings.cache_dir)
    return directories
