"""Embeddings that are kept for a while: a bounded number of objects in the store, of which the oldest are deleted.

Room is made before something is written, so the bound holds at every moment. An object may go before its reader comes;
the reader asks again. What an earlier process left behind is deleted at the start, since nobody knows its age.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from reverie.common.v1.common_pb2 import TensorRef
from reverie_common.concurrency import SingleFlight
from reverie_common.storage import ObjectStore
from reverie_common.storage.derived import DerivedTensor
from reverie_common.storage.keys import on_demand_prefix

logger = logging.getLogger(__name__)


class OnDemandTensors:
    """This process's passing tensors. Belongs to one event loop.

    Args:
        store: Where they are.
        max_objects: Bound on their number, 1 at least.
    """

    def __init__(self, store: ObjectStore, *, max_objects: int) -> None:
        self._store = store
        self._max_objects = max_objects
        # None: its writing failed or was given up, so that it may be there or not.
        self._known: OrderedDict[str, TensorRef | None] = OrderedDict()
        self._num_reserved = 0
        self._changed = asyncio.Condition()
        self._flights: SingleFlight[str, TensorRef] = SingleFlight()

    def __len__(self) -> int:
        """Objects that are in the store or about to be."""
        return len(self._known) + self._num_reserved

    async def clear(self, fingerprints: Iterable[str]) -> None:
        """Delete what earlier processes with encoders of these fingerprints left behind. Safe to repeat."""
        for fingerprint in fingerprints:
            num_deleted = await asyncio.to_thread(self._delete_all, on_demand_prefix(fingerprint))
            if num_deleted:
                logger.info("%d embeddings of an earlier process deleted", num_deleted)

    async def get(self, key: str, make: Callable[[], Coroutine[Any, Any, TensorRef]]) -> DerivedTensor:
        """Refer to the tensor of this key, calling `make` if there is none, which stores it under the key.

        A tensor that is asked for is the newest again. Concurrent calls for one key share one computation.
        """
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            return DerivedTensor(ref=known, cached=True)
        ref, joined = await self._flights.run(key, lambda: self._make(key, make))
        return DerivedTensor(ref=ref, cached=joined)

    async def _make(self, key: str, make: Callable[[], Coroutine[Any, Any, TensorRef]]) -> TensorRef:
        await self._reserve()
        try:
            ref = await make()
        except BaseException:
            self._known.setdefault(key, None)
            self._known.move_to_end(key, last=False)
            raise
        else:
            self._known[key] = ref
            return ref
        finally:
            # In the same breath as the entry, so that nothing is counted twice.
            self._num_reserved -= 1
            async with self._changed:
                self._changed.notify_all()

    async def _reserve(self) -> None:
        """Wait until there is something to delete or room, and make room."""
        async with self._changed:
            while len(self) >= self._max_objects:
                if not self._known:
                    await self._changed.wait()
                    continue
                # Forgotten first: nobody shall be sent to an object that is being deleted.
                key, ref = self._known.popitem(last=False)
                try:
                    await asyncio.to_thread(self._store.delete, key)
                except BaseException:
                    self._known[key] = ref
                    self._known.move_to_end(key, last=False)
                    raise
            self._num_reserved += 1

    def _delete_all(self, prefix: str) -> int:
        keys = [found.key for found in self._store.list(prefix)]
        for key in keys:
            self._store.delete(key)
        return len(keys)
