"""Previews of a picture on its way: fired off and forgotten. They never delay the drawing and never fail it.

One call is under way at a time, a few wait, and the oldest of those makes room; after a failure the rest of the picture
goes without.
"""

import asyncio
import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reverie.common.v1.common_pb2 import ObjectRef
from reverie.vae.v1 import vae_pb2
from reverie_common.errors import ReverieError
from reverie_common.rpc.channel import translated
from reverie_common.storage import ObjectStore, put_tensor
from reverie_common.storage.keys import content_digest, sample_key

from reverie_sampler.engine import LatentPreview
from reverie_sampler.metrics import PREVIEWS

if TYPE_CHECKING:
    from reverie.vae.v1.vae_pb2_grpc import VaeServiceAsyncStub

logger = logging.getLogger(__name__)

LATENTS_NAME = "preview"
CALL_TIMEOUT_SECONDS = 10.0
MAX_WAITING = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """A picture before its last step."""

    index: int
    step: int
    num_steps: int
    timestep: float
    image: ObjectRef


class PreviewMaker:
    """Makes the previews of one picture. Belongs to one event loop."""

    def __init__(self, vae: "VaeServiceAsyncStub", store: ObjectStore, *, index: int, latents_key: str) -> None:
        """Nothing is under way.

        Args:
            index: of the picture in its order.
            latents_key: names the finished latent; previews are named after it and their step.
        """
        self._vae = vae
        self._store = store
        self._index = index
        self._latents_key = latents_key
        self._waiting: deque[LatentPreview] = deque()
        self._ready: deque[Preview] = deque()
        self._running: asyncio.Task[None] | None = None
        self._problem: str | None = None

    @property
    def problem(self) -> str | None:
        """Why there are no more previews of this picture; None as long as there are."""
        return self._problem

    def offer(self, preview: LatentPreview) -> None:
        """Make a preview when its turn comes; returns at once."""
        if self._problem is not None:
            PREVIEWS.labels("dropped").inc()
            return
        self._waiting.append(preview)
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popleft()
            PREVIEWS.labels("dropped").inc()
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._work())

    def take(self) -> list[Preview]:
        """Remove and return the previews that are ready."""
        ready = list(self._ready)
        self._ready.clear()
        return ready

    async def finish(self, patience_seconds: float) -> list[Preview]:
        """Wait a little for what is under way, drop the rest, and return what is ready. Safe to repeat."""
        if self._running is not None:
            await asyncio.wait({self._running}, timeout=patience_seconds)
            self._running.cancel()
            await asyncio.wait({self._running})
        return self.take()

    async def _work(self) -> None:
        while self._waiting and self._problem is None:
            try:
                self._ready.append(await self._make(self._waiting.popleft()))
                PREVIEWS.labels("made").inc()
            except ReverieError as error:
                logger.info("no more previews of this picture: %s", error.message)
                self._problem = error.message
                PREVIEWS.labels("dropped").inc(1 + len(self._waiting))

    async def _make(self, preview: LatentPreview) -> Preview:
        key = sample_key(content_digest({"kind": "preview", "of": self._latents_key, "step": preview.step}))
        latents = await asyncio.to_thread(put_tensor, self._store, key, LATENTS_NAME, preview.latents, compressed=False)
        request = vae_pb2.PreviewLatentsRequest(latents=latents)
        with translated():
            response = await self._vae.PreviewLatents(request, timeout=CALL_TIMEOUT_SECONDS)
        return Preview(
            index=self._index,
            step=preview.step,
            num_steps=preview.num_steps,
            timestep=preview.timestep,
            image=response.images[0],
        )
