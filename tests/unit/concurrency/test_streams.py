"""as_ready: answers in the order of their ends, a bounded number at a time, nothing left behind."""

import asyncio

import pytest
from reverie_common.concurrency import as_ready


class Kitchen:
    """Prepares numbered dishes when told to; knows what is being prepared."""

    def __init__(self, num_dishes: int) -> None:
        self.done = [asyncio.Event() for _ in range(num_dishes)]
        self.preparing: set[int] = set()
        self.most_at_once = 0

    async def prepare(self, number: int) -> int:
        self.preparing.add(number)
        self.most_at_once = max(self.most_at_once, len(self.preparing))
        try:
            await self.done[number].wait()
        finally:
            self.preparing.discard(number)
        if number == 13:
            raise ValueError("13")
        return number


async def test_answers_come_as_they_are_ready() -> None:
    kitchen = Kitchen(3)
    answers = as_ready(range(3), kitchen.prepare, max_in_flight=3)
    order = []
    for number in (2, 0, 1):
        kitchen.done[number].set()
        order.append(await anext(answers))
    assert order == [2, 0, 1]
    with pytest.raises(StopAsyncIteration):
        await anext(answers)


async def test_no_more_than_the_limit_are_in_flight() -> None:
    kitchen = Kitchen(12)
    for event in kitchen.done:
        event.set()
    answers = [answer async for answer in as_ready(range(12), kitchen.prepare, max_in_flight=4)]
    assert sorted(answers) == list(range(12))
    assert kitchen.most_at_once <= 4


async def test_an_error_ends_the_rest() -> None:
    kitchen = Kitchen(14)
    kitchen.done[13].set()
    with pytest.raises(ValueError, match="13"):
        await anext(as_ready(range(14), kitchen.prepare, max_in_flight=14))
    assert kitchen.preparing == set()


async def test_leaving_early_ends_the_rest() -> None:
    kitchen = Kitchen(6)
    kitchen.done[4].set()
    answers = as_ready(range(6), kitchen.prepare, max_in_flight=6)
    assert await anext(answers) == 4
    await asyncio.create_task(answers.aclose())  # type: ignore[attr-defined]  # an async generator; another task
    assert kitchen.preparing == set()


async def test_nothing_gives_nothing() -> None:
    kitchen = Kitchen(0)
    assert [answer async for answer in as_ready(range(0), kitchen.prepare, max_in_flight=2)] == []
