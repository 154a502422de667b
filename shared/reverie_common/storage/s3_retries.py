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
from reverie_common.storage.s3_errors import StoreAddress, error_from_exception
from reverie_common.telemetry.metrics import STORE_SECONDS

T = TypeVar("T")

logger = logging.getLogger(__name__)

FIRST_DELAY_SECONDS = 0.1
MAX_DELAY_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Retries:
    """How long and how often to repeat."""

    limit_seconds: float
    """Nothing is begun again after this; 0 tries once."""

    address: StoreAddress
    """Where requests go, for messages."""

    def perform(self, operation: str, key: str, request: Callable[[], T]) -> T:
        """Make a request, and again while the store is unavailable, with exponential backoff and jitter. Blocks.

        Raises:
            ReverieError: what the last attempt came to.
        """
        deadline = time.monotonic() + self.limit_seconds
        delay_seconds = FIRST_DELAY_SECONDS
        while True:
            try:
                return self._attempt(operation, key, request)
            except StoreUnavailableError as error:
                pause_seconds = delay_seconds * random.uniform(0.5, 1.0)  # noqa: S311  # spreads load, hides nothing
                if time.monotonic() + pause_seconds > deadline:
                    raise
                self._log(operation, delay_seconds, error)
            time.sleep(pause_seconds)
            delay_seconds = min(2 * delay_seconds, MAX_DELAY_SECONDS)

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
