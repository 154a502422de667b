"""What the engine's thread tells the event loop while it draws, and the wish to stop the other way."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator

from reverie_common.storage import RawTensor

from reverie_sampler.engine import DrawingHooks, LatentPreview
from reverie_sampler.metrics import STEP_SECONDS


class DrawingFeed:
    """Yields None for every step and a LatentPreview for every preview. Belongs to one event loop."""

    def __init__(self) -> None:
        """Nothing is drawn yet."""
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[LatentPreview | bool] = asyncio.Queue()
        self._stopped = threading.Event()
        self._last = time.monotonic()

    @property
    def hooks(self) -> DrawingHooks:
        """For the engine's thread."""
        return DrawingHooks(on_step=self._push_step, should_stop=self._stopped.is_set, on_preview=self._push_preview)

    def stop(self) -> None:
        """Let the drawing end before its next step."""
        self._stopped.set()

    def close(self, running: asyncio.Future[RawTensor]) -> None:
        """No more steps; called by the event loop."""
        if not running.cancelled():
            running.exception()  # seen, even where the caller has left before it was raised
        self._queue.put_nowait(False)

    async def __aiter__(self) -> AsyncIterator[LatentPreview | None]:
        while item := await self._queue.get():
            yield None if item is True else item

    def _push_step(self, step: int, num_steps: int) -> None:
        del step, num_steps
        now = time.monotonic()
        STEP_SECONDS.observe(now - self._last)
        self._last = now
        self._loop.call_soon_threadsafe(self._queue.put_nowait, True)

    def _push_preview(self, preview: LatentPreview) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, preview)
