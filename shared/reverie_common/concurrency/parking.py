"""A model that waits in host memory while nobody uses it, so that processes can take turns on one device."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Protocol

logger = logging.getLogger(__name__)


class Parkable(Protocol):
    """What can be parked."""

    def to_host(self) -> None:
        """Give the device's memory back. Blocks; may be repeated."""
        ...

    def to_device(self) -> None:
        """Take the device's memory again; on an error the model stays on the host. Blocks; may be repeated."""
        ...


class Parking:
    """Has a model on its device while it is used, and parks it when nobody has used it for a while. Thread-safe.

    Args:
        model: It is on its device at first.
        idle_seconds: How long nobody uses it before it is parked; 0 parks only when told to.
        on_change: Told whether it is parked, whenever that changes.
    """

    def __init__(self, model: Parkable, *, idle_seconds: float, on_change: Callable[[bool], None]) -> None:
        self._model = model
        self._idle_seconds = idle_seconds
        self._on_change = on_change
        self._changed = threading.Condition()
        self._num_users = 0
        self._is_parked = False
        self._is_closed = False
        self._last_use = monotonic()
        self._watcher: threading.Thread | None = None
        if idle_seconds > 0:
            self._watcher = threading.Thread(target=self._watch, name="parking", daemon=True)
            self._watcher.start()

    @property
    def is_parked(self) -> bool:
        """Whether the model waits in host memory."""
        return self._is_parked

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the model on its device for the body of the `with`, fetching it first if it is parked. Blocks."""
        with self._changed:
            if self._is_parked:
                self._model.to_device()
                self._tell(is_parked=False)
            self._num_users += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_users -= 1
                self._last_use = monotonic()
                self._changed.notify_all()

    def release(self) -> bool:
        """Park now, if nobody uses the model; returns whether it is parked. Blocks; may be repeated."""
        with self._changed:
            if self._num_users == 0:
                self._park()
            return self._is_parked

    def close(self) -> None:
        """Park no more by itself. Safe to repeat."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._watcher is not None:
            self._watcher.join()

    def _watch(self) -> None:
        with self._changed:
            while not self._is_closed:
                if self._is_parked or self._num_users:
                    self._changed.wait()
                elif (left := self._last_use + self._idle_seconds - monotonic()) > 0:
                    self._changed.wait(left)
                else:
                    self._park()

    def _park(self) -> None:
        if not self._is_parked:
            self._model.to_host()
            self._tell(is_parked=True)

    def _tell(self, *, is_parked: bool) -> None:
        self._is_parked = is_parked
        logger.info("the model is %s", "parked in host memory" if is_parked else "back on its device")
        self._on_change(is_parked)
