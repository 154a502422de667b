"""Tensors that are made once: looked up in memory, then in the store, then made and stored.

Sits between a service's domain and `refs.py`: `make` computes a tensor and stores it under the key with put_tensor.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from reverie.common.v1.common_pb2 import TensorRef

from reverie_common.concurrency import SingleFlight
from reverie_common.storage.refs import tensor_ref_if_present
from reverie_common.storage.store import ObjectStore


@dataclass(frozen=True, kw_only=True, slots=True)
class DerivedTensor:
    """A reference to a tensor object in the store."""

    ref: TensorRef
    cached: bool
    """False for the one caller whose question caused the computation."""


class DerivedTensors:
    """A process's view of the derived tensors in the store. Belongs to one event loop.

    Args:
        store: Where they are.
        capacity: References to remember, about 1 kB each; the least recently used go first.
    """

    def __init__(self, store: ObjectStore, *, capacity: int = 65536) -> None:
        self._store = store
        self._capacity = capacity
        self._known: OrderedDict[str, TensorRef] = OrderedDict()
        self._flights: SingleFlight[str, tuple[TensorRef, bool]] = SingleFlight()

    async def get(self, key: str, make: Callable[[], Coroutine[Any, Any, TensorRef]]) -> DerivedTensor:
        """Refer to the tensor of this key, calling `make` only if the store has none.

        Concurrent calls for one key share one lookup and one computation, and its error.
        """
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            return DerivedTensor(ref=known, cached=True)
        (ref, was_stored), joined = await self._flights.run(key, lambda: self._find_or_make(key, make))
        return DerivedTensor(ref=ref, cached=was_stored or joined)

    async def _find_or_make(
        self, key: str, make: Callable[[], Coroutine[Any, Any, TensorRef]]
    ) -> tuple[TensorRef, bool]:
        stored = await asyncio.to_thread(tensor_ref_if_present, self._store, key)
        ref = await make() if stored is None else stored
        self._known[key] = ref
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return ref, stored is not None
