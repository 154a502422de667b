"""One computation per key at a time, shared by everybody who asks for it meanwhile."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)
ValueT = TypeVar("ValueT")


class _Flight(Generic[ValueT]):
    def __init__(self, task: asyncio.Task[ValueT]) -> None:
        self.task = task
        self.num_waiters = 0


class SingleFlight(Generic[KeyT, ValueT]):
    """Deduplicates concurrent computations. Belongs to one event loop; remembers nothing once a computation is over."""

    def __init__(self) -> None:
        self._flights: dict[KeyT, _Flight[ValueT]] = {}

    async def run(self, key: KeyT, compute: Callable[[], Coroutine[Any, Any, ValueT]]) -> tuple[ValueT, bool]:
        """Return what `compute` gives for this key, and whether somebody else had already started it.

        An error reaches everybody who waits. The computation is cancelled when its last waiter is.
        """
        flight = self._flights.get(key)
        joined = flight is not None
        if flight is None:
            flight = self._start(key, compute)
        flight.num_waiters += 1
        try:
            return await asyncio.shield(flight.task), joined
        finally:
            flight.num_waiters -= 1
            if flight.num_waiters == 0 and not flight.task.done():
                flight.task.cancel()
                self._forget(key, flight)

    def _start(self, key: KeyT, compute: Callable[[], Coroutine[Any, Any, ValueT]]) -> _Flight[ValueT]:
        flight = _Flight(asyncio.create_task(compute()))
        self._flights[key] = flight
        flight.task.add_done_callback(lambda _: self._forget(key, flight))
        return flight

    def _forget(self, key: KeyT, flight: _Flight[ValueT]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if flight.task.done() and not flight.task.cancelled():
            flight.task.exception()  # seen, even where every waiter was cancelled before it was raised
