"""Many items of one request at once, answered as they are ready."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from itertools import islice
from typing import Any, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


async def as_ready(
    items: Iterable[ItemT], work: Callable[[ItemT], Coroutine[Any, Any, ResultT]], *, max_in_flight: int
) -> AsyncIterator[ResultT]:
    """Yield `work(item)` of each item in the order in which they end, at most max_in_flight of them at a time.

    The first error is raised and ends the rest; so does leaving the iterator. Plain tasks and not a TaskGroup: when a
    caller hangs up, an async generator is closed from another task than the one that ran it.
    """
    rest = iter(items)
    running: set[asyncio.Task[ResultT]] = set()
    ready: set[asyncio.Task[ResultT]] = set()
    try:
        running |= {asyncio.create_task(work(item)) for item in islice(rest, max_in_flight)}
        while running:
            ready, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            running |= {asyncio.create_task(work(item)) for item in islice(rest, len(ready))}
            while ready:
                yield ready.pop().result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, *ready, return_exceptions=True)
