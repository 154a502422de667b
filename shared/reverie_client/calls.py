"""How the SDK makes one call: deadline, retries, typed errors. Not here: which calls there are."""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from grpc.aio import UnaryStreamMultiCallable, UnaryUnaryMultiCallable
from reverie_common.errors import DeadlineExceededError, ResourceExhaustedError, ReverieError, UnavailableError
from reverie_common.rpc.channel import error_from_rpc, translated

Request = TypeVar("Request")
Response = TypeVar("Response")
Page = TypeVar("Page")

MAX_DELAY_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CallPolicy:
    """How patient the SDK is."""

    timeout_seconds: float = 30.0
    """Deadline of one attempt of a unary call."""
    stream_timeout_seconds: float = 3600.0
    """Deadline of one attempt of a streaming call."""
    retry_seconds: float = 10.0
    """For how long a call is repeated while the server is unavailable or asks for patience."""
    watch_patience_seconds: float = 300.0
    """For how long a watch waits for a server that has gone away."""


class Backoff:
    """Delays that double from 0.2 s to 5 s, with jitter, until a total is used up."""

    def __init__(self, total_seconds: float) -> None:
        """Start the clock."""
        self._total_seconds = total_seconds
        self.restart()

    def restart(self) -> None:
        """Begin again, after something went well."""
        self._deadline = asyncio.get_running_loop().time() + self._total_seconds
        self._delay = 0.2

    async def pause(self, error: ReverieError) -> None:
        """Sleep before the next attempt; raises the error when the time is used up."""
        delay = error.retry_after_seconds or self._delay * random.uniform(0.75, 1.25)  # noqa: S311 - jitter
        if asyncio.get_running_loop().time() + delay > self._deadline:
            raise error
        await asyncio.sleep(delay)
        self._delay = min(self._delay * 2, MAX_DELAY_SECONDS)


def new_request_id(given: str | None = None) -> str:
    """Return the id of one logical call: the same on every attempt."""
    return given or str(uuid.uuid4())


def is_worth_repeating(error: ReverieError) -> bool:
    """Tell whether the same call may succeed later; every call of the SDK may be repeated safely."""
    if isinstance(error, ResourceExhaustedError):
        return error.retry_after_seconds is not None
    return isinstance(error, UnavailableError)


async def repeated(attempt: Callable[[], Awaitable[Response]], policy: CallPolicy) -> Response:
    """Await `attempt()` until it succeeds, fails for good, or `policy.retry_seconds` have passed.

    Raises: the typed error of the last attempt.
    """
    backoff = Backoff(policy.retry_seconds)
    while True:
        try:
            with translated():
                return await attempt()
        except ReverieError as error:
            if not is_worth_repeating(error):
                raise
            await backoff.pause(error)


async def call(method: UnaryUnaryMultiCallable[Request, Response], request: Request, policy: CallPolicy) -> Response:
    """Make one unary call with its deadline and retries."""
    try:
        return await repeated(lambda: method(request, timeout=policy.timeout_seconds), policy)
    except DeadlineExceededError as error:
        if error.metadata:  # the server says more about it than we know
            raise
        raise DeadlineExceededError(
            f"no answer within {policy.timeout_seconds:g} s; the service is overloaded, or waits for another or for "
            "the object store: its log says which; repeat the command later",
            reason=error.reason,
        ) from error


async def stream(
    method: UnaryStreamMultiCallable[Request, Response], request: Request, policy: CallPolicy
) -> AsyncIterator[Response]:
    """Yield the responses of one streaming call; repeated only while nothing has been yielded."""
    backoff = Backoff(policy.retry_seconds)
    while True:
        has_begun = False
        try:
            with translated():
                async for response in method(request, timeout=policy.stream_timeout_seconds):
                    has_begun = True
                    yield response
                return
        except ReverieError as error:
            if has_begun or not is_worth_repeating(error):
                raise
            await backoff.pause(error)


async def all_pages(
    fetch: Callable[[str], Awaitable[Page]], items: Callable[[Page], Any], limit: int | None
) -> tuple[Any, ...]:
    """Return the items of every page, at most `limit` of them."""
    found: list[Any] = []
    token = ""
    while limit is None or len(found) < limit:
        page = await fetch(token)
        found.extend(items(page))
        token = getattr(page, "next_page_token", "")
        if not token:
            break
    return tuple(found[:limit])


RESUMABLE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})
"""How a long stream ends when the server stops, restarts, or the deadline of this attempt passes."""


def resumable_error(error: grpc.aio.AioRpcError) -> ReverieError:
    """Translate what ended a long stream; raises it when another attempt would not help."""
    translated_error = error_from_rpc(error)
    if error.code() not in RESUMABLE:
        raise translated_error from error
    return translated_error
