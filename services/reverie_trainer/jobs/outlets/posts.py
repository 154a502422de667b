"""POST requests to hosts that are allowed, with patience for those that are away."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import urllib3

from reverie_trainer.jobs.outlets.hosts import AllowedHosts
from reverie_trainer.jobs.outlets.outlet import OutletFailedError

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 10.0
FIRST_DELAY_SECONDS = 0.5
MAX_DELAY_SECONDS = 30.0

# Answers that another try may change: too many requests, and the server's own troubles.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, kw_only=True, slots=True)
class Post:
    """One request. Its URL may be a secret and is shown to nobody."""

    url: str
    body: bytes
    headers: Mapping[str, str]


class Poster:
    """Sends requests; never follows a redirect, which would leave the allow-list."""

    def __init__(self, hosts: AllowedHosts, *, patience_seconds: float = 60.0) -> None:
        self._hosts = hosts
        self._patience_seconds = patience_seconds
        self._http = urllib3.PoolManager(
            retries=False, timeout=urllib3.Timeout(connect=TIMEOUT_SECONDS, read=TIMEOUT_SECONDS)
        )

    async def send(self, post: Post, *, is_patient: bool = True) -> None:
        """Send a request, and again while the other side is away.

        Raises:
            OutletFailedError: it was refused, or the other side was away for too long.
        """
        problem = self._hosts.problem(post.url)
        if problem is not None:
            raise OutletFailedError(message=problem)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (self._patience_seconds if is_patient else 0.0)
        delay = FIRST_DELAY_SECONDS
        while True:
            answer = await asyncio.to_thread(self._try, post)
            if answer is None:
                return
            if not answer.is_passing or loop.time() + delay > deadline:
                raise OutletFailedError(message=answer.message)
            await asyncio.sleep(max(delay, answer.retry_after_seconds))
            delay = min(2 * delay, MAX_DELAY_SECONDS)

    def _try(self, post: Post) -> "_Refusal | None":
        problem = self._hosts.require_public_address(post.url)
        if problem is not None:
            return _Refusal(message=problem, is_passing="not found" in problem)
        try:
            response = self._http.request(
                "POST", post.url, body=post.body, headers=dict(post.headers), redirect=False, preload_content=False
            )
            try:
                response.read(4096)
            finally:
                response.release_conn()
        except urllib3.exceptions.HTTPError as error:
            # The message of the error holds the URL; its class says enough.
            return _Refusal(message=f"no answer ({type(error).__name__})", is_passing=True)
        if 200 <= response.status < 300:
            return None
        seconds = response.headers.get("Retry-After", "")
        return _Refusal(
            message=f"the answer was {response.status}",
            is_passing=response.status in _PASSING,
            retry_after_seconds=min(float(seconds), MAX_DELAY_SECONDS) if seconds.isdigit() else 0.0,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Refusal:
    message: str
    is_passing: bool
    retry_after_seconds: float = 0.0
