"""Micro-batching: many callers' single items become batches for one worker thread.

The queue is bounded; a caller that finds it full is refused with the time after which to try again. A batch starts when
it is full or its oldest item has waited for the window. Items whose caller has gone are dropped before they cost
anything. Nothing polls.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Generic, Protocol, TypeVar

from reverie_common.errors import ResourceExhaustedError, UnavailableError

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLimits:
    """How a MicroBatcher forms batches and when it refuses."""

    max_batch_size: int
    """Items per batch at most."""

    window_seconds: float
    """How long the oldest item waits for company. A busy worker waits for nothing: the queue has filled meanwhile."""

    max_waiting: int
    """Items that may wait; the next one is refused."""

    max_held: int
    """Results that callers may still hold while the next batch starts. Bounds memory when storing is slower."""

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_waiting", "max_held"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.window_seconds < 0:
            raise ValueError(f"window_seconds is {self.window_seconds}, must not be negative")


class BatchObserver(Protocol):
    """What a MicroBatcher tells its metrics."""

    def queue_changed(self, num_waiting: int) -> None:
        """The number of waiting items is now this."""
        ...

    def batch_started(self, waits_seconds: Sequence[float]) -> None:
        """A batch starts; one wait for each of its items."""
        ...

    def batch_finished(self, seconds: float) -> None:
        """The batch took this long in the worker thread."""
        ...


class _Entry(Generic[ItemT, ResultT]):
    __slots__ = ("arrival", "future", "group", "is_held", "item")

    def __init__(self, item: ItemT, group: Hashable) -> None:
        self.item = item
        self.group = group
        self.arrival = monotonic()
        self.future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        self.is_held = False


class MicroBatcher(Generic[ItemT, ResultT]):
    """Runs `run(items) -> results` in an executor, for items that arrive one by one on one event loop.

    Args:
        run: Called in the executor, one call at a time, with 1 to max_batch_size items of one group; gives one result
            for each, in order. What it raises reaches exactly the callers of that batch.
        executor: Where it runs, usually a thread that owns a model. Not shut down here.
        limits: Sizes and times.
        observer: Told about the queue and the batches.
        group_of: Items of different groups never share a batch, for instance images of different sizes.
    """

    def __init__(
        self,
        run: Callable[[Sequence[ItemT]], Sequence[ResultT]],
        *,
        executor: Executor,
        limits: BatchLimits,
        observer: BatchObserver,
        group_of: Callable[[ItemT], Hashable] = lambda _: None,
    ) -> None:
        self._run = run
        self._executor = executor
        self._limits = limits
        self._observer = observer
        self._group_of = group_of
        self._waiting: deque[_Entry[ItemT, ResultT]] = deque()
        self._num_held = 0
        self._changed = asyncio.Event()
        self._seconds_per_item = 0.1
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    def start(self) -> None:
        """Begin to form batches, on the running event loop."""
        self._task = asyncio.create_task(self._serve(), name="micro-batcher")

    async def close(self) -> None:
        """Refuse new items and those that wait, let the running batch finish. Safe to repeat."""
        self._is_closed = True
        while self._waiting:
            self._fail(self._waiting.popleft(), _closing())
        self._notice_queue()
        if self._task is not None:
            self._changed.set()
            await self._task
            self._task = None

    @asynccontextmanager
    async def submit(self, item: ItemT) -> AsyncIterator[ResultT]:
        """Wait for an item's result and hold it for the body of the `async with`.

        Raises:
            ResourceExhaustedError: max_waiting items wait already.
            UnavailableError: the batcher is closed.
        """
        entry = self._enqueue(item)
        try:
            yield await entry.future
        finally:
            self._release(entry)

    def _enqueue(self, item: ItemT) -> _Entry[ItemT, ResultT]:
        if self._is_closed:
            raise _closing()
        if len(self._waiting) >= self._limits.max_waiting:
            raise self._full()
        entry: _Entry[ItemT, ResultT] = _Entry(item, self._group_of(item))
        self._waiting.append(entry)
        self._notice_queue()
        return entry

    def _full(self) -> ResourceExhaustedError:
        num_waiting = len(self._waiting)
        delay = max(1.0, num_waiting * self._seconds_per_item / 2)
        return ResourceExhaustedError(
            f"{num_waiting} items wait already, the limit is {self._limits.max_waiting}; try again in {delay:.0f} s",
            reason="QUEUE_FULL",
            metadata={"num_waiting": str(num_waiting), "max_waiting": str(self._limits.max_waiting)},
            retry_after_seconds=delay,
        )

    def _release(self, entry: _Entry[ItemT, ResultT]) -> None:
        if entry.is_held:
            entry.is_held = False
            self._num_held -= 1
            self._changed.set()
            return
        entry.future.cancel()
        if entry in self._waiting:
            self._waiting.remove(entry)
            self._notice_queue()

    def _notice_queue(self) -> None:
        self._observer.queue_changed(len(self._waiting))
        self._changed.set()

    async def _serve(self) -> None:
        while not self._is_closed:
            self._changed.clear()
            batch, wait_seconds = self._next_batch()
            if batch:
                await self._run_batch(batch)
            else:
                await self._wait_for_change(wait_seconds)

    def _next_batch(self) -> tuple[list[_Entry[ItemT, ResultT]], float | None]:
        """Take the next batch off the queue; or none, with the seconds after which to look again at the latest."""
        if not self._waiting:
            return [], None
        head = self._waiting[0]
        same_group = (entry for entry in self._waiting if entry.group == head.group)
        batch = [entry for entry, _ in zip(same_group, range(self._limits.max_batch_size), strict=False)]
        if self._num_held and self._num_held + len(batch) > self._limits.max_held:
            return [], None
        window_left = head.arrival + self._limits.window_seconds - monotonic()
        if len(batch) < self._limits.max_batch_size and window_left > 0:
            return [], window_left
        taken = set(map(id, batch))
        self._waiting = deque(entry for entry in self._waiting if id(entry) not in taken)
        self._notice_queue()
        return batch, None

    async def _wait_for_change(self, seconds: float | None) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _run_batch(self, batch: Sequence[_Entry[ItemT, ResultT]]) -> None:
        started = monotonic()
        self._observer.batch_started([started - entry.arrival for entry in batch])
        items = [entry.item for entry in batch]
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._executor, self._run, items)
        except Exception as error:  # thread boundary: the error belongs to the callers of this batch
            for entry in batch:
                self._fail(entry, error)
        else:
            for entry, result in zip(batch, results, strict=True):
                self._deliver(entry, result)
        self._notice_pace(monotonic() - started, len(batch))

    def _notice_pace(self, seconds: float, num_items: int) -> None:
        self._observer.batch_finished(seconds)
        self._seconds_per_item += 0.2 * (seconds / num_items - self._seconds_per_item)

    def _deliver(self, entry: _Entry[ItemT, ResultT], result: ResultT) -> None:
        if entry.future.done():
            return
        entry.future.set_result(result)
        entry.is_held = True
        self._num_held += 1

    def _fail(self, entry: _Entry[ItemT, ResultT], error: Exception) -> None:
        if not entry.future.done():
            entry.future.set_exception(error)


def _closing() -> UnavailableError:
    return UnavailableError("the service is stopping; try again", reason="SHUTTING_DOWN", retry_after_seconds=5.0)
