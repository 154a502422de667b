"""Embeddings that are made once: looked up in the store, else encoded in micro-batches and stored.

One forward per distinct prompt and encoder, however many requests ask at the same moment.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from reverie.common.v1.common_pb2 import TensorRef
from reverie_common.concurrency import BatchLimits, MicroBatcher
from reverie_common.storage import ObjectStore, RawTensor, put_tensor
from reverie_common.storage.derived import DerivedTensors
from reverie_common.storage.keys import content_digest, text_key

from reverie_encoder.engine import EncoderEngine, EncoderFacts, PromptCut
from reverie_encoder.metrics import EMBEDDINGS, STAGE_SECONDS, BatchMetrics

TENSOR_NAME = "embedding"

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
    """

    def __init__(self, *, engine: EncoderEngine, store: ObjectStore, limits: BatchLimits) -> None:
        self._engine = engine
        self._store = store
        self._derived = DerivedTensors(store)
        self._threads = {name: ThreadPoolExecutor(1, thread_name_prefix=name) for name in engine.facts}
        self._batchers = {name: self._batcher(name, limits) for name in engine.facts}

    @property
    def facts(self) -> Sequence[EncoderFacts]:
        """The encoders of this process."""
        return tuple(self._engine.facts.values())

    def start(self) -> None:
        """Begin to serve, on the running event loop."""
        for batcher in self._batchers.values():
            batcher.start()

    async def close(self) -> None:
        """Refuse what waits, finish what runs. Safe to repeat."""
        await asyncio.gather(*(batcher.close() for batcher in self._batchers.values()))
        for thread in self._threads.values():
            thread.shutdown()

    async def embed(self, encoder: str, prompt: str) -> Embedded:
        """Refer to one prompt's embedding, making it if the store has none. Safe to repeat.

        Raises:
            ResourceExhaustedError: the encoder's queue is full.
            StoreUnavailableError, StoreFullError: the store cannot be read or written.
        """
        key = embedding_key(self._engine.facts[encoder].fingerprint, prompt)
        derived = await self._derived.get(key, lambda: self._make(encoder, prompt, key))
        EMBEDDINGS.labels(encoder, "cached" if derived.cached else "computed").inc()
        cut = await asyncio.to_thread(self._engine.measure, encoder, prompt)
        return Embedded(encoder=encoder, tensor=derived.ref, cached=derived.cached, cut=cut)

    async def _make(self, encoder: str, prompt: str, key: str) -> TensorRef:
        async with self._batchers[encoder].submit(prompt) as tensor:
            with STAGE_SECONDS.labels(encoder, "store").time():
                return await asyncio.to_thread(self._put, key, tensor)

    def _put(self, key: str, tensor: RawTensor) -> TensorRef:
        return put_tensor(self._store, key, TENSOR_NAME, tensor, compressed=tensor.size_bytes >= _COMPRESS_FROM_BYTES)

    def _batcher(self, name: str, limits: BatchLimits) -> MicroBatcher[str, RawTensor]:
        return MicroBatcher(
            lambda prompts: self._engine.encode(name, prompts),
            executor=self._threads[name],
            limits=limits,
            observer=BatchMetrics(name),
        )


def embedding_key(fingerprint: str, prompt: str) -> str:
    """Key of one prompt's embedding by the encoder of this fingerprint."""
    return text_key(fingerprint, content_digest({"prompt": prompt}))
