"""Embeddings of captions: read from the store, or asked of the encoders ahead of their use.

With `embedding_storage: on_demand` nothing but a bounded number of objects is kept. The batches that are made ahead are
the window: their prompts are asked for together, so that the encoders see batches too. An object may be deleted before
it is read, by a newer one; then it is asked for again.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch
from reverie.common.v1.common_pb2 import TensorRef
from reverie_common.errors import ObjectNotFoundError

from reverie_trainer.jobs.preparing.progress import StageProgress
from reverie_trainer.jobs.preparing.prompts import EncodedPrompts, EncoderPlan, encode_prompts, plan_encoders
from reverie_trainer.jobs.preparing.services import EncoderClient
from reverie_trainer.jobs.running.failures import JobFailedError
from reverie_trainer.worker.control_thread import ControlThread
from reverie_trainer.worker.outbox import Outbox
from reverie_trainer.worker.samples import Caption
from reverie_trainer.worker.tensor_cache import TensorCache

Tensors = Mapping[str, torch.Tensor]
"""One caption's embedding by each encoder."""

_REMEMBERED_PROMPTS = 4096
_MAX_TRIES = 20


class CaptionReader(Protocol):
    """Gives the embeddings of captions. Thread-safe."""

    def read(self, captions: Sequence[Caption]) -> list[Tensors]:
        """Return the embeddings, in order. Blocks; do not change them: others share them. `cancel` ends it.

        Raises:
            ReverieError: the store is away, or something is missing from it.
            JobFailedError: an encoder service was away for too long, or is another one now.
        """
        ...

    def cancel(self) -> None:
        """End the reads that wait for an encoder now, with concurrent.futures.CancelledError."""
        ...

    def close(self) -> None:
        """Let go of what reading needed."""
        ...


class StoredCaptions:
    """Captions that preparation had encoded."""

    def __init__(self, cache: TensorCache) -> None:
        """Nothing is read yet."""
        self._cache = cache

    def read(self, captions: Sequence[Caption]) -> list[Tensors]:
        """See CaptionReader."""
        return [_read(self._cache, caption.embeddings) for caption in captions]

    def cancel(self) -> None:
        """See CaptionReader; nothing waits for an encoder here."""

    def close(self) -> None:
        """See CaptionReader; the store is everybody's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderAddresses:
    """Whom to ask, and for how long."""

    addresses: tuple[str, ...]
    patience_seconds: float
    """How long a service may be away."""


class OnDemandCaptions:
    """Captions that are encoded when they are needed. Owned by the control thread; read from any."""

    def __init__(
        self,
        encoders: EncoderAddresses,
        fingerprints: Mapping[str, str],
        *,
        cache: TensorCache,
        control: ControlThread,
        outbox: Outbox,
    ) -> None:
        """Nobody is asked yet.

        Args:
            fingerprints: of the encoders that the job was prepared with.
        """
        self._encoders = encoders
        self._fingerprints = dict(fingerprints)
        self._cache = cache
        self._control = control
        self._outbox = outbox
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Mapping[str, TensorRef]] = OrderedDict()
        self._num_cut = 0
        self._planning = asyncio.Lock()
        self._plan: EncoderPlan | None = None
        self._asking: set[Future[EncodedPrompts]] = set()
        self._clients = control.run(self._connect())

    def close(self) -> None:
        """Close the connections."""
        self._control.run(self._disconnect())

    def cancel(self) -> None:
        """See CaptionReader."""
        with self._lock:
            for asking in self._asking:
                asking.cancel()

    def read(self, captions: Sequence[Caption]) -> list[Tensors]:
        """See CaptionReader. The empty caption is in the store, like that of any job."""
        found: dict[str, Tensors] = {}
        for _ in range(_MAX_TRIES):
            for caption in captions:
                if caption.text not in found:
                    tensors = self._read_known(caption)
                    if tensors is not None:
                        found[caption.text] = tensors
            missing = sorted({caption.text for caption in captions} - found.keys())
            if not missing:
                return [found[caption.text] for caption in captions]
            self._remember(self._ask(missing))
        raise JobFailedError(
            "ON_DEMAND_TOO_SMALL",
            f"{len(missing)} captions were deleted from the store before they were read, {_MAX_TRIES} times running",
            "Raise --on-demand-objects of the encoder service to some times 4 x batch_size x the worker's "
            "prefetch_batches, then resume the job.",
        )

    def _ask(self, prompts: Sequence[str]) -> EncodedPrompts:
        asking = self._control.start(self._encode(prompts))
        with self._lock:
            self._asking.add(asking)
        try:
            return asking.result()
        finally:
            with self._lock:
                self._asking.discard(asking)

    def _read_known(self, caption: Caption) -> Tensors | None:
        """What can be read without asking; None where nothing is known or it was deleted since."""
        if caption.embeddings:
            return _read(self._cache, caption.embeddings)
        with self._lock:
            references = self._known.get(caption.text)
        if references is None:
            return None
        try:
            return _read(self._cache, references)
        except ObjectNotFoundError:
            with self._lock:
                self._known.pop(caption.text, None)
            return None

    def _remember(self, encoded: EncodedPrompts) -> None:
        with self._lock:
            self._known.update(encoded.embeddings)
            while len(self._known) > _REMEMBERED_PROMPTS:
                self._known.popitem(last=False)
        self._tell_cuts(encoded)

    def _tell_cuts(self, encoded: EncodedPrompts) -> None:
        first = not self._num_cut
        self._num_cut += len(encoded.cuts)
        if first and encoded.cuts:
            prompt, cuts = next(iter(encoded.cuts.items()))
            self._outbox.warn(
                "CAPTIONS_TRUNCATED",
                f"captions are longer than an encoder reads, the first: {cuts[0].encoder} saw {cuts[0].max_length} of "
                f"{cuts[0].num_tokens} tokens of {prompt[:80]!r}. Say what matters first, or shorten them.",
            )

    async def _encode(self, prompts: Sequence[str]) -> EncodedPrompts:
        plan = await self._planned()
        progress = StageProgress("", len(prompts), _tell_nobody, 0.0)
        encoded = await encode_prompts(prompts, plan, progress, "on_demand")
        for references in encoded.embeddings.values():
            # A service may have been restarted since it was described; keys name what made the objects.
            self._require({name: reference.uri.split("/")[-3] for name, reference in references.items()})
        return encoded

    async def _planned(self) -> EncoderPlan:
        """Who encodes what: asked once, by one batch for all that wait, so that an outage is told once."""
        async with self._planning:
            if self._plan is None:
                plan = await plan_encoders(self._clients, self._encoders.patience_seconds, self._notice)
                self._require(plan.fingerprints)
                self._plan = plan
            return self._plan

    def _require(self, fingerprints: Mapping[str, str]) -> None:
        changed = sorted(name for name, mark in fingerprints.items() if self._fingerprints.get(name) != mark)
        if changed:
            raise JobFailedError(
                "ENCODERS_CHANGED",
                f"{', '.join(changed)} of the encoder services are not those that the job was prepared with: weights, "
                "precision or dtype differ",
                "Start the services as they were and resume the job, or submit it again.",
            )

    async def _notice(self, reason: str, message: str) -> None:
        self._outbox.warn(reason, message)

    async def _connect(self) -> tuple[EncoderClient, ...]:
        return tuple(EncoderClient(address) for address in self._encoders.addresses)

    async def _disconnect(self) -> None:
        for client in self._clients:
            await client.close()


async def _tell_nobody(_progress: object) -> None:
    """Batches are too small for a progress of their own."""


def _read(cache: TensorCache, references: Mapping[str, TensorRef]) -> Tensors:
    return {name: cache.get(reference) for name, reference in references.items()}
