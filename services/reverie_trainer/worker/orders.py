"""What the trainer, the operating system or the store want of the training loop, asked for between two steps."""

from __future__ import annotations

import enum
import threading


class Order(enum.IntEnum):
    """What the loop has to do; a higher one overrules a lower one."""

    GO_ON = 0
    """Train."""
    STOP = 1
    """Save, say so, and end."""
    DESERT = 2
    """The trainer has been away for too long: save and end; a later worker goes on."""
    LEAVE = 3
    """The lease is lost: another worker has the job, touch nothing."""


class Orders:
    """Thread-safe; orders are never taken back."""

    def __init__(self) -> None:
        """Go on."""
        self._lock = threading.Lock()
        self._order = Order.GO_ON
        self._why = ""
        self._num_pictures_asked = 0
        self._num_pictures_seen = 0

    @property
    def current(self) -> Order:
        """What to do now."""
        return self._order

    @property
    def why(self) -> str:
        """Why, in words."""
        return self._why

    def note_picture_requests(self, num_requests: int, *, are_new: bool = True) -> None:
        """Take note of how often people have asked for pictures so far."""
        with self._lock:
            self._num_pictures_asked = max(self._num_pictures_asked, num_requests)
            if not are_new:
                self._num_pictures_seen = self._num_pictures_asked

    def take_picture_request(self) -> bool:
        """Whether somebody has asked for pictures since this was called last."""
        with self._lock:
            is_asked = self._num_pictures_asked > self._num_pictures_seen
            self._num_pictures_seen = self._num_pictures_asked
            return is_asked

    def give(self, order: Order, why: str) -> None:
        """Give an order; one that is weaker than the present one changes nothing."""
        with self._lock:
            if order > self._order:
                self._order, self._why = order, why
