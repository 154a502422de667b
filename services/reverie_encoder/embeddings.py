"""Embeddings that are made once: looked up in the store, else encoded in micro-batches and stored.

One forward per distinct prompt and encoder, however many requests ask at the same moment. Three ways to keep them, each
under keys of its own: `exact`; `compact`, whose pooled vectors of a few kB are exact, and those objects; `on_demand`,
exact, for a while.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from reverie.common.v1.common_pb2 import TensorRef
from reverie_common.concurrency import BatchLimits, MicroBatcher
from reverie_common.storage import ObjectStore, RawTensor, put_tensor
from reverie_common.storage.derived import DerivedTensor, DerivedTensors
from reverie_common.storage.keys import ON_DEMAND_OBJECTS, content_digest, on_demand_key, text_key
from reverie_common.storage.refs import EXACT, INT8_GROUPS, tensor_ref_if_present

from reverie_encoder.engine import EncoderEngine, EncoderFacts, PromptCut
from reverie_encoder.metrics import EMBEDDINGS, STAGE_SECONDS, BatchMetrics
from reverie_encoder.on_demand import OnDemandTensors

TENSOR_NAME = "embedding"

STORAGES = ("exact", "compact", "on_demand")

# Pooled vectors are 1.5 to 2.5 kB: compressing them saves nothing and costs every reader a call.
_COMPRESS_FROM_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedded:
    """One prompt's embedding by one encoder."""

    encoder: str
    tensor: TensorRef
    cached: bool
    """False for the one caller whose question caused the computation."""
    cut: PromptCut


class Embeddings:
    """Answers for all encoders of this process. Belongs to one event loop.

    Args:
        engine: The loaded encoders. Each gets a thread of its own.
        store: Where embeddings are kept.
        limits: Of each encoder's batches and queue.
        max_on_demand: Objects that are kept for a while, of all encoders together.
    """

    def __init__(
        self, *, engine: EncoderEngine, store: ObjectStore, limits: BatchLimits, max_on_demand: int = ON_DEMAND_OBJECTS
    ) -> None:
        self._engine = engine
        self._store = store
        self._derived = DerivedTensors(store)
        self._passing = OnDemandTensors(store, max_objects=max_on_demand)
        self._threads = {name: ThreadPoolExecutor(1, thread_name_prefix=name) for name in engine.facts}
        self._batchers = {name: self._batcher(name, limits) for name in engine.facts}

    @property
    def facts(self) -> Sequence[EncoderFacts]:
        """The encoders of this process."""
        return tuple(self._engine.facts.values())

    async def start(self) -> None:
        """Begin to serve, on the running event loop.

        Raises:
            StoreUnavailableError: what an earlier process left behind cannot be deleted.
        """
        await self._passing.clear(facts.fingerprint for facts in self.facts)
        for batcher in self._batchers.values():
            batcher.start()

    async def close(self) -> None:
        """Refuse what waits, finish what runs. Safe to repeat."""
        await asyncio.gather(*(batcher.close() for batcher in self._batchers.values()))
        for thread in self._threads.values():
            thread.shutdown()
        await asyncio.to_thread(self._engine.close)

    async def release(self) -> bool:
        """Move idle encoders to host memory; returns whether all are there. Safe to repeat."""
        return await asyncio.to_thread(self._engine.release)

    async def embed(self, encoder: str, prompt: str, storage: str = "exact") -> Embedded:
        """Refer to one prompt's embedding, making it if the store has none. Safe to repeat.

        Args:
            storage: one of STORAGES.

        Raises:
            ResourceExhaustedError: the encoder's queue is full.
            StoreUnavailableError, StoreFullError: the store cannot be read or written.
        """
        derived = await (
            self._pass(encoder, prompt) if storage == "on_demand" else self._keep(encoder, prompt, storage)
        )
        EMBEDDINGS.labels(encoder, "cached" if derived.cached else "computed").inc()
        cut = await asyncio.to_thread(self._engine.measure, encoder, prompt)
        return Embedded(encoder=encoder, tensor=derived.ref, cached=derived.cached, cut=cut)

    async def _keep(self, encoder: str, prompt: str, storage: str) -> DerivedTensor:
        facts = self._engine.facts[encoder]
        encoding = INT8_GROUPS if storage == "compact" and len(facts.shape) > 1 else EXACT
        key = embedding_key(facts.fingerprint, prompt, encoding)
        return await self._derived.get(key, lambda: self._make(encoder, prompt, key, encoding))

    async def _pass(self, encoder: str, prompt: str) -> DerivedTensor:
        """What is kept for good anyway is taken; only what is not goes among the passing ones."""
        fingerprint = self._engine.facts[encoder].fingerprint
        kept = await asyncio.to_thread(tensor_ref_if_present, self._store, embedding_key(fingerprint, prompt))
        if kept is not None:
            return DerivedTensor(ref=kept, cached=True)
        key = on_demand_key(fingerprint, content_digest({"prompt": prompt}))
        return await self._passing.get(key, lambda: self._make(encoder, prompt, key, EXACT, has_companion=False))

    async def _make(
        self, encoder: str, prompt: str, key: str, encoding: str, *, has_companion: bool = True
    ) -> TensorRef:
        async with self._batchers[encoder].submit(prompt) as tensor:
            with STAGE_SECONDS.labels(encoder, "store").time():
                return await asyncio.to_thread(
                    put_tensor,
                    self._store,
                    key,
                    TENSOR_NAME,
                    tensor,
                    # int8 has no redundant bytes left.
                    compressed=encoding == EXACT and tensor.size_bytes >= _COMPRESS_FROM_BYTES,
                    encoding=encoding,
                    has_companion=has_companion,
                )

    def _batcher(self, name: str, limits: BatchLimits) -> MicroBatcher[str, RawTensor]:
        return MicroBatcher(
            lambda prompts: self._engine.encode(name, prompts),
            executor=self._threads[name],
            limits=limits,
            observer=BatchMetrics(name),
        )


def embedding_key(fingerprint: str, prompt: str, encoding: str = EXACT) -> str:
    """Key of one prompt's embedding by the encoder of this fingerprint, in this encoding."""
    record = {"prompt": prompt} if encoding == EXACT else {"prompt": prompt, "encoding": encoding}
    return text_key(fingerprint, content_digest(record))
