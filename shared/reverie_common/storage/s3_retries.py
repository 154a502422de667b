"""Repeating requests to the object store while it does not answer, so that a restart of it is survived."""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import minio
import urllib3
from minio.error import MinioException

from reverie_common.errors import ReverieError, StoreUnavailableError
from reverie_common.storage.s3_errors import StoreAddress, error_from_exception, full_store
from reverie_common.telemetry.metrics import STORE_SECONDS

T = TypeVar("T")

logger = logging.getLogger(__name__)

FIRST_DELAY_SECONDS = 0.1
MAX_DELAY_SECONDS = 5.0

# A server that has just started may refuse a write or two; after this it is full.
FULL_AFTER_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Retries:
    """How long and how often to repeat."""

    limit_seconds: float
    """Nothing is begun again after this; 0 tries once."""

    address: StoreAddress
    """Where requests go, for messages."""

    def perform(
        self, operation: str, key: str, request: Callable[[], T], *, can_read: Callable[[], bool] | None = None
    ) -> T:
        """Make a request, and again while the store is unavailable, with exponential backoff and jitter. Blocks.

        Args:
            operation: name of the operation in metrics and logs.
            key: what it is about, for messages.
            request: makes the request anew each time.
            can_read: for writes, asks whether the store answers a read; see _is_full.

        Raises:
            ReverieError: what the last attempt came to.
        """
        begin = time.monotonic()
        delay_seconds = FIRST_DELAY_SECONDS
        while True:
            try:
                return self._attempt(operation, key, request)
            except StoreUnavailableError as error:
                pause_seconds = delay_seconds * random.uniform(0.5, 1.0)  # noqa: S311  # spreads load, hides nothing
                waited_seconds = time.monotonic() - begin
                is_last = waited_seconds + pause_seconds > self.limit_seconds
                if (is_last or waited_seconds > FULL_AFTER_SECONDS) and self._is_full(error, can_read):
                    raise full_store(self.address, key, error.metadata["cause"]) from error
                if is_last:
                    raise
                self._log(operation, delay_seconds, error)
            time.sleep(pause_seconds)
            delay_seconds = min(2 * delay_seconds, MAX_DELAY_SECONDS)

    def _is_full(self, error: StoreUnavailableError, can_read: Callable[[], bool] | None) -> bool:
        # SeaweedFS says nothing but "500 InternalError" when its volumes or its disk are full. A server that goes on
        # refusing writes while it answers reads has no room, whatever it says.
        return can_read is not None and "status" in error.metadata and can_read()

    def _attempt(self, operation: str, key: str, request: Callable[[], T]) -> T:
        with STORE_SECONDS.labels(operation).time():
            try:
                return request()
            except ReverieError:
                raise
            except (minio.S3Error, MinioException, urllib3.exceptions.HTTPError, OSError) as error:
                raise error_from_exception(error, self.address, key) from error

    def _log(self, operation: str, delay_seconds: float, error: StoreUnavailableError) -> None:
        level = logging.WARNING if delay_seconds == FIRST_DELAY_SECONDS else logging.DEBUG
        logger.log(
            level,
            "%s; trying again for up to %.0f s",
            error.message,
            self.limit_seconds,
            extra={"operation": operation, "endpoint": self.address.endpoint},
        )
