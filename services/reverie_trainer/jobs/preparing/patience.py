"""Asking services for many things: in chunks, several at a time, and again while a service is away."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from reverie_common.errors import (
    DeadlineExceededError,
    InternalError,
    ResourceExhaustedError,
    ReverieError,
    UnavailableError,
)

from reverie_trainer.jobs.running.failures import JobFailedError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Answer = TypeVar("Answer")

Notice = Callable[[str, str], Awaitable[None]]
"""Tells people something, with a reason for programs and a message."""

_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 5.0

# A full queue for a moment is how a service says "slower"; only what lasts is worth a line in the job's history.
_QUIET_SECONDS = 2.0


async def tell_nobody(_reason: str, _message: str) -> None:
    """A Notice for work that nobody follows."""


class Patience:
    """How long one service may be away, and the telling of it."""

    def __init__(self, service: str, limit_seconds: float, notice: Notice) -> None:
        self._service = service
        self._limit_seconds = limit_seconds
        self._notice = notice
        self._away_since: float | None = None
        self._is_told = False
        self._pause_seconds = _FIRST_PAUSE_SECONDS

    async def answered(self) -> None:
        """Note that the service answered."""
        if self._is_told:
            await self._notice("SERVICE_BACK", f"{self._service} answers again")
        self._away_since = None
        self._is_told = False
        self._pause_seconds = _FIRST_PAUSE_SECONDS

    async def wait(self, error: ReverieError) -> None:
        """Pause before the next attempt.

        Raises:
            JobFailedError: the service was away for longer than allowed.
        """
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
        away_seconds = now - self._away_since
        if away_seconds > self._limit_seconds:
            raise self._give_up(error, away_seconds)
        if away_seconds > _QUIET_SECONDS and not self._is_told:
            self._is_told = True
            await self._notice(
                error.reason, f"waiting for {self._service}, at most {self._limit_seconds:g} s: {error.message}"
            )
        pause_seconds = max(self._pause_seconds, min(error.retry_after_seconds or 0.0, _LONGEST_PAUSE_SECONDS))
        self._pause_seconds = min(self._pause_seconds * 2, _LONGEST_PAUSE_SECONDS)
        await asyncio.sleep(pause_seconds)

    def _give_up(self, error: ReverieError, away_seconds: float) -> JobFailedError:
        return JobFailedError(
            error.reason,
            f"{self._service} could not be used for {away_seconds:.0f} s (limit {self._limit_seconds:g} s): "
            f"{error.message}",
            f"Start {self._service} again, or make room where it is full; then resume the job "
            "(`reverie job resume JOB_ID`).",
        )


def is_worth_repeating(error: ReverieError) -> bool:
    """Whether the same call may succeed later."""
    if isinstance(error, UnavailableError | ResourceExhaustedError | DeadlineExceededError):
        return True
    # A server that stops in the middle of a stream cancels it.
    return isinstance(error, InternalError) and error.reason == "CANCELLED"


async def patiently(call: Callable[[], Awaitable[Answer]], patience: Patience) -> Answer:
    """Make a call, and again while the service is away.

    Raises:
        JobFailedError: it was away for too long.
        ReverieError: any error that repeating does not help.
    """
    while True:
        try:
            answer = await call()
        except ReverieError as error:
            if not is_worth_repeating(error):
                raise
            await patience.wait(error)
        else:
            await patience.answered()
            return answer


async def ask_in_chunks(
    items: Sequence[Item],
    call: Callable[[Sequence[Item]], AsyncGenerator[tuple[int, Answer], None]],
    on_answer: Callable[[int, Answer], Awaitable[None]],
    *,
    patience: Patience,
    chunk_size: int,
    num_parallel: int,
) -> None:
    """Ask for every item, `chunk_size` in one call and `num_parallel` calls at a time; every item is answered once.

    `call` yields (index into its items, answer) in any order. When it breaks off, only what is missing is asked again.
    """
    chunks = [range(start, min(start + chunk_size, len(items))) for start in range(0, len(items), chunk_size)]
    waiting = iter(chunks)

    async def ask_on() -> None:
        for chunk in waiting:
            await _ask_chunk(items, list(chunk), call, on_answer, patience)

    await together(*(ask_on() for _ in range(min(num_parallel, len(chunks)))))


async def together(*parts: Coroutine[Any, Any, None]) -> None:
    """Run coroutines at the same time; the first error cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for part in parts:
                group.create_task(part)
    except ExceptionGroup as error:
        # One cause is enough for a job; the others failed for the same reason.
        raise error.exceptions[0] from error


async def both(first: Coroutine[Any, Any, Item], second: Coroutine[Any, Any, Answer]) -> tuple[Item, Answer]:
    """Run two coroutines at the same time and return both results; the first error cancels the other and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = group.create_task(first), group.create_task(second)
    except ExceptionGroup as error:
        raise error.exceptions[0] from error
    return tasks[0].result(), tasks[1].result()


async def _ask_chunk(
    items: Sequence[Item],
    missing: list[int],
    call: Callable[[Sequence[Item]], AsyncGenerator[tuple[int, Answer], None]],
    on_answer: Callable[[int, Answer], Awaitable[None]],
    patience: Patience,
) -> None:
    while missing:
        asked = list(missing)
        try:
            async with aclosing(call([items[index] for index in asked])) as answers:
                async for position, answer in answers:
                    missing.remove(asked[position])
                    await patience.answered()
                    await on_answer(asked[position], answer)
            if missing:
                raise UnavailableError(f"{len(missing)} of {len(asked)} answers are missing", reason="ANSWERS_MISSING")
        except ReverieError as error:
            if not is_worth_repeating(error):
                raise
            logger.info("asking again for %d of %d items: %s", len(missing), len(asked), error.message)
            await patience.wait(error)
