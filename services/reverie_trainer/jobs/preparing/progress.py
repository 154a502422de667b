"""Telling how far preparation is, often enough to watch and seldom enough to keep."""

import time
from collections.abc import Awaitable, Callable

from reverie.training.v1 import job_pb2

OnProgress = Callable[[job_pb2.PreparationProgress], Awaitable[None]]


class StageProgress:
    """Counts the items of one stage; the first and the last report are always made, others not too often."""

    def __init__(self, stage: str, num_total: int, on_progress: OnProgress, interval_seconds: float) -> None:
        self.num_cached = 0
        self._stage = stage
        self._num_total = num_total
        self._num_done = 0
        self._on_progress = on_progress
        self._interval_seconds = interval_seconds
        self._told_at = time.monotonic()

    async def begin(self) -> None:
        """Report that nothing is done yet."""
        await self._tell()

    async def advance(self, *, cached: bool = False) -> None:
        """Count one more item."""
        self._num_done += 1
        self.num_cached += int(cached)
        if self._num_done == self._num_total or time.monotonic() - self._told_at >= self._interval_seconds:
            await self._tell()

    async def _tell(self) -> None:
        self._told_at = time.monotonic()
        await self._on_progress(
            job_pb2.PreparationProgress(
                stage=self._stage,
                num_done=self._num_done,
                num_total=self._num_total,
                num_cached=self.num_cached,
            )
        )
