"""MicroBatcher: how batches form, what is refused, who gets which result or error. The worker thread is real."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest
from reverie_common.concurrency import BatchLimits, MicroBatcher
from reverie_common.errors import ResourceExhaustedError, UnavailableError

PATIENT = 60.0
"""A window that no test waits for."""


class Watcher:
    """A BatchObserver that remembers."""

    def __init__(self) -> None:
        self.depths: list[int] = []
        self.sizes: list[int] = []
        self.num_finished = 0

    def queue_changed(self, num_waiting: int) -> None:
        self.depths.append(num_waiting)

    def batch_started(self, waits_seconds: Sequence[float]) -> None:
        assert all(seconds >= 0 for seconds in waits_seconds)
        self.sizes.append(len(waits_seconds))

    def batch_finished(self, seconds: float) -> None:
        assert seconds >= 0
        self.num_finished += 1


class Worker:
    """Doubles numbers; waits at a gate that a test can close, and says which batches it saw."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def run(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        assert self.gate.wait(10)
        if -1 in items:
            raise ValueError("a batch with -1 cannot be doubled")
        return [2 * item for item in items]


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as one_thread:
        yield one_thread


@pytest.fixture
def worker() -> Iterator[Worker]:
    double = Worker()
    yield double
    double.gate.set()


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


Batching = Callable[..., "MicroBatcher[int, int]"]


@pytest.fixture
def batching(executor: ThreadPoolExecutor, worker: Worker, watcher: Watcher) -> Batching:
    """Makes a batcher for the worker."""

    def make(
        *, size: int = 4, window: float = 0.0, waiting: int = 100, held: int = 100, by_parity: bool = False
    ) -> MicroBatcher[int, int]:
        limits = BatchLimits(max_batch_size=size, window_seconds=window, max_waiting=waiting, max_held=held)
        group_of = (lambda item: item % 2) if by_parity else (lambda _: None)
        return MicroBatcher(worker.run, executor=executor, limits=limits, observer=watcher, group_of=group_of)

    return make


@asynccontextmanager
async def running(batcher: MicroBatcher[int, int]) -> AsyncIterator[MicroBatcher[int, int]]:
    batcher.start()
    try:
        yield batcher
    finally:
        await asyncio.wait_for(batcher.close(), 10)


async def submit(batcher: MicroBatcher[int, int], item: int) -> int:
    async with batcher.submit(item) as result:
        return result


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until something is so."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the worker's thread sets it
            await asyncio.sleep(0.001)


async def test_sixteen_calls_are_two_batches_of_eight(batching: Batching, worker: Worker, watcher: Watcher) -> None:
    async with running(batching(size=8, window=PATIENT)) as batcher:
        results = await asyncio.gather(*(submit(batcher, item) for item in range(16)))
    assert results == [2 * item for item in range(16)]
    assert worker.batches == [list(range(8)), list(range(8, 16))]
    assert (watcher.sizes, watcher.num_finished, watcher.depths[-1]) == ([8, 8], 2, 0)


async def test_the_window_ends_the_wait_for_company(batching: Batching, worker: Worker) -> None:
    async with running(batching(size=8, window=0.02)) as batcher:
        results = await asyncio.gather(*(submit(batcher, item) for item in range(3)))
    assert results == [0, 2, 4]
    assert worker.batches == [[0, 1, 2]]


async def test_what_comes_while_the_worker_is_busy_is_the_next_batch(batching: Batching, worker: Worker) -> None:
    async with running(batching(size=8)) as batcher:
        worker.gate.clear()
        first = asyncio.create_task(submit(batcher, 0))
        await until(lambda: worker.batches == [[0]])
        rest = [asyncio.create_task(submit(batcher, item)) for item in range(1, 6)]
        await asyncio.sleep(0)
        worker.gate.set()
        assert list(await asyncio.gather(first, *rest)) == [0, 2, 4, 6, 8, 10]
    assert worker.batches == [[0], [1, 2, 3, 4, 5]]


async def test_groups_never_share_a_batch(batching: Batching, worker: Worker) -> None:
    async with running(batching(size=3, window=0.02, by_parity=True)) as batcher:
        results = await asyncio.gather(*(submit(batcher, item) for item in (0, 1, 2, 3, 4)))
    assert results == [0, 2, 4, 6, 8]
    assert worker.batches == [[0, 2, 4], [1, 3]]


async def test_the_waiter_beyond_the_limit_is_refused(batching: Batching, worker: Worker) -> None:
    async with running(batching(size=1, waiting=2)) as batcher:
        worker.gate.clear()
        busy = asyncio.create_task(submit(batcher, 0))
        await until(lambda: worker.batches == [[0]])
        waiting = [asyncio.create_task(submit(batcher, item)) for item in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhaustedError) as refusal:
            await submit(batcher, 3)
        worker.gate.set()
        assert list(await asyncio.gather(busy, *waiting)) == [0, 2, 4]
    assert refusal.value.reason == "QUEUE_FULL"
    assert refusal.value.metadata == {"num_waiting": "2", "max_waiting": "2"}
    assert refusal.value.retry_after_seconds is not None
    assert refusal.value.retry_after_seconds >= 1


async def test_cancelled_waiters_cost_nothing_and_free_their_place(batching: Batching, worker: Worker) -> None:
    async with running(batching(size=8, waiting=3)) as batcher:
        worker.gate.clear()
        busy = asyncio.create_task(submit(batcher, 0))
        await until(lambda: worker.batches == [[0]])
        waiting = [asyncio.create_task(submit(batcher, item)) for item in (1, 2, 3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        waiting[1].cancel()
        await asyncio.gather(*waiting[:2], return_exceptions=True)
        late = asyncio.create_task(submit(batcher, 4))
        await asyncio.sleep(0)
        worker.gate.set()
        assert list(await asyncio.gather(busy, waiting[2], late)) == [0, 6, 8]
    assert worker.batches == [[0], [3, 4]]


async def test_an_error_reaches_exactly_its_batch(batching: Batching) -> None:
    async with running(batching(size=2, window=PATIENT)) as batcher:
        results = await asyncio.gather(*(submit(batcher, item) for item in (1, -1, 3, 4)), return_exceptions=True)
        assert list(await asyncio.gather(submit(batcher, 5), submit(batcher, 6))) == [10, 12]
    assert [type(result) for result in results] == [ValueError, ValueError, int, int]


async def test_results_that_are_held_stop_the_next_batch(batching: Batching, worker: Worker) -> None:
    async with running(batching(size=1, held=1)) as batcher:
        async with batcher.submit(1) as held:
            second = asyncio.create_task(submit(batcher, 2))
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert (held, worker.batches) == (2, [[1]])
        assert await second == 4
    assert worker.batches == [[1], [2]]


async def test_one_batch_larger_than_the_hold_limit_still_runs(batching: Batching) -> None:
    async with running(batching(size=4, window=PATIENT, held=2)) as batcher:
        assert await asyncio.gather(*(submit(batcher, item) for item in range(4))) == [0, 2, 4, 6]


async def test_closing_finishes_what_runs_and_refuses_the_rest(batching: Batching, worker: Worker) -> None:
    batcher = batching(size=1)
    batcher.start()
    worker.gate.clear()
    runs = asyncio.create_task(submit(batcher, 1))
    await until(lambda: worker.batches == [[1]])
    waits = asyncio.create_task(submit(batcher, 2))
    await asyncio.sleep(0)
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0)
    with pytest.raises(UnavailableError):
        await submit(batcher, 3)
    worker.gate.set()
    await asyncio.wait_for(closing, 10)
    assert await runs == 2
    with pytest.raises(UnavailableError):
        await waits
    await batcher.close()


@pytest.mark.parametrize("field", ["max_batch_size", "max_waiting", "max_held"])
def test_limits_below_one_are_refused(field: str) -> None:
    values = {"max_batch_size": 1, "max_waiting": 1, "max_held": 1, field: 0}
    with pytest.raises(ValueError, match=field):
        BatchLimits(window_seconds=0.0, **values)


def test_a_negative_window_is_refused() -> None:
    with pytest.raises(ValueError, match="window_seconds"):
        BatchLimits(max_batch_size=1, max_waiting=1, max_held=1, window_seconds=-1.0)
