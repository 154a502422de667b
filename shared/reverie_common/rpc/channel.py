"""Channels to Reverie's services, and what every caller needs around a call."""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import grpc

from reverie_common.errors import ReverieError, UnavailableError
from reverie_common.rpc.status import MAX_METADATA_BYTES, error_from_rpc, translated

__all__ = [
    "MAX_MESSAGE_BYTES",
    "connect",
    "error_from_rpc",
    "remaining_seconds",
    "repeat_while_unavailable",
    "translated",
]

T = TypeVar("T")

# gRPC's own default, stated: larger things travel through the object store.
MAX_MESSAGE_BYTES = 4 * 1024 * 1024

KEEPALIVE_SECONDS = 30
RETRY_POLICY = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 3,
    "retryableStatusCodes": ["UNAVAILABLE"],
}

# What is left for the answer on its way back, so that the callee's deadline is not later than the caller's.
RETURN_SECONDS = 0.05


def connect(target: str, *, retries: bool = True, options: Mapping[str, str | int] | None = None) -> grpc.aio.Channel:
    """Make a channel; it connects when first used and again whenever the connection breaks.

    Calls that fail with UNAVAILABLE before an answer began are repeated up to three times within their deadline: every
    mutation of the contract carries a request_id or is idempotent by its content.

    Args:
        target: `host:port`, or a gRPC name such as `dns:///trainer.namespace.svc:50053`, over whose addresses calls are
            spread.
        retries: repeat calls as above.
        options: gRPC channel options to add or replace.
    """
    service_config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if retries:
        service_config["methodConfig"] = [{"name": [{}], "retryPolicy": RETRY_POLICY}]
        service_config["retryThrottling"] = {"maxTokens": 20, "tokenRatio": 0.1}
    defaults: dict[str, str | int] = {
        "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
        "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
        "grpc.max_metadata_size": MAX_METADATA_BYTES,
        "grpc.absolute_max_metadata_size": MAX_METADATA_BYTES,
        "grpc.keepalive_time_ms": KEEPALIVE_SECONDS * 1000,
        "grpc.keepalive_timeout_ms": 20_000,
        "grpc.http2.max_pings_without_data": 0,
        # A service that was restarted is found within a second or two, not after gRPC's two minutes.
        "grpc.initial_reconnect_backoff_ms": 200,
        "grpc.min_reconnect_backoff_ms": 200,
        "grpc.max_reconnect_backoff_ms": 2_000,
        "grpc.service_config": json.dumps(service_config),
        # A proxy of the environment is for the internet, not for the services of one installation.
        "grpc.enable_http_proxy": 0,
    }
    return grpc.aio.insecure_channel(target, options=list({**defaults, **(options or {})}.items()))


def remaining_seconds(context: "grpc.aio.ServicerContext[Any, Any]", own_limit: float) -> float:
    """Timeout for a call made on behalf of another one: grpc.aio hands no deadline on by itself.

    Args:
        context: of the call being served.
        own_limit: seconds that the call may take at most, whatever its caller allows.
    """
    left = context.time_remaining()
    return own_limit if left is None else max(0.0, min(own_limit, left - RETURN_SECONDS))


async def repeat_while_unavailable(
    call: Callable[[], Awaitable[T]], *, limit_seconds: float, max_delay_seconds: float = 5.0
) -> T:
    """Make a call, and again with backoff while the service is unavailable, so that a restart of it is survived.

    Args:
        call: makes the call anew each time; it must be safe to repeat and have its own timeout.
        limit_seconds: nothing is begun again after this.
        max_delay_seconds: longest pause between two calls.

    Raises:
        ReverieError: what the last call came to; any other error than UnavailableError at once.
    """
    deadline = time.monotonic() + limit_seconds
    delay_seconds = 0.2
    while True:
        try:
            with translated():
                return await call()
        except UnavailableError as error:
            pause_seconds = _pause_seconds(error, min(delay_seconds, max_delay_seconds))
            if time.monotonic() + pause_seconds > deadline:
                raise
        await asyncio.sleep(pause_seconds)
        delay_seconds *= 2


def _pause_seconds(error: ReverieError, delay_seconds: float) -> float:
    asked_seconds = min(error.retry_after_seconds or 0.0, delay_seconds)
    return max(asked_seconds, delay_seconds * random.uniform(0.5, 1.0))  # noqa: S311  # spreads load, hides nothing
