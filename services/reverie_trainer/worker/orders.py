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

    @property
    def current(self) -> Order:
        """What to do now."""
        return self._order

    @property
    def why(self) -> str:
        """Why, in words."""
        return self._why

    def give(self, order: Order, why: str) -> None:
        """Give an order; one that is weaker than the present one changes nothing."""
        with self._lock:
            if order > self._order:
                self._order, self._why = order, why
