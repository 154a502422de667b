"""SingleFlight: one computation per key at a time, shared, with its error, and ended with its last waiter."""

import asyncio

import pytest
from reverie_common.concurrency import SingleFlight


class Computation:
    """Counts how often it is begun, waits to be let go, knows when it was cancelled."""

    def __init__(self) -> None:
        self.num_begun = 0
        self.num_cancelled = 0
        self.go = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self) -> str:
        self.num_begun += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return f"answer {self.num_begun}"


@pytest.fixture
async def compute() -> Computation:
    return Computation()


async def test_concurrent_callers_share_one_computation(compute: Computation) -> None:
    flights: SingleFlight[str, str] = SingleFlight()
    callers = [asyncio.create_task(flights.run("key", compute)) for _ in range(5)]
    await asyncio.sleep(0)
    compute.go.set()
    assert await asyncio.gather(*callers) == [("answer 1", joined) for joined in (False, True, True, True, True)]


async def test_keys_do_not_share(compute: Computation) -> None:
    flights: SingleFlight[int, str] = SingleFlight()
    compute.go.set()
    answers = await asyncio.gather(*(flights.run(key, compute) for key in range(3)))
    assert compute.num_begun == 3
    assert [joined for _, joined in answers] == [False, False, False]


async def test_nothing_is_remembered(compute: Computation) -> None:
    flights: SingleFlight[str, str] = SingleFlight()
    compute.go.set()
    assert [await flights.run("key", compute) for _ in range(2)] == [("answer 1", False), ("answer 2", False)]


async def test_an_error_reaches_everybody_and_the_next_caller_tries_again(compute: Computation) -> None:
    flights: SingleFlight[str, str] = SingleFlight()
    compute.error = ValueError("no")
    compute.go.set()
    results = await asyncio.gather(*(flights.run("key", compute) for _ in range(3)), return_exceptions=True)
    assert results == [compute.error] * 3
    compute.error = None
    assert await flights.run("key", compute) == ("answer 2", False)


async def test_one_cancelled_caller_leaves_the_others_theirs(compute: Computation) -> None:
    flights: SingleFlight[str, str] = SingleFlight()
    callers = [asyncio.create_task(flights.run("key", compute)) for _ in range(3)]
    await asyncio.sleep(0)
    callers[0].cancel()
    await asyncio.gather(callers[0], return_exceptions=True)
    compute.go.set()
    assert [answer for answer, _ in await asyncio.gather(*callers[1:])] == ["answer 1", "answer 1"]
    assert compute.num_cancelled == 0


async def test_the_last_cancelled_caller_ends_the_computation(compute: Computation) -> None:
    flights: SingleFlight[str, str] = SingleFlight()
    callers = [asyncio.create_task(flights.run("key", compute)) for _ in range(2)]
    await asyncio.sleep(0)
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    compute.go.set()
    assert await flights.run("key", compute) == ("answer 2", False)
    assert compute.num_cancelled == 1
