"""Tensors of the store, the most recently used of them kept in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future

import torch
from reverie.common.v1.common_pb2 import TensorRef
from reverie_common.storage import ObjectStore, get_tensor
from reverie_hidream.tensor_io import from_raw


class TensorCache:
    """Thread-safe. Tensors that are asked for by several threads at once are read once."""

    def __init__(self, store: ObjectStore, *, max_bytes: int) -> None:
        """Start empty.

        Args:
            max_bytes: of tensors kept; one that is larger alone is handed out and not kept.
        """
        self._store = store
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[str, str], Future[torch.Tensor]] = OrderedDict()
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that are kept."""
        return self._num_bytes

    def get(self, ref: TensorRef) -> torch.Tensor:
        """Return a tensor, on the CPU. Blocks while it is read; do not change it: others share it.

        Raises:
            ReverieError: the store is away, or does not hold the tensor unharmed.
        """
        key = (ref.uri, ref.name)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
            else:
                mine: Future[torch.Tensor] = Future()
                self._entries[key] = mine
        if entry is not None:
            return entry.result()
        self._read(key, ref, mine)
        return mine.result()

    def _read(self, key: tuple[str, str], ref: TensorRef, entry: Future[torch.Tensor]) -> None:
        try:
            tensor = from_raw(get_tensor(self._store, ref))
        except BaseException as error:
            # Whoever waits for this read gets its error; the next one who asks tries again.
            with self._lock:
                del self._entries[key]
            entry.set_exception(error)
            raise
        entry.set_result(tensor)
        with self._lock:
            self._num_bytes += tensor.nbytes
            self._evict()

    def _evict(self) -> None:
        for key, entry in list(self._entries.items()):
            if self._num_bytes <= self._max_bytes:
                return
            # What is still being read is not counted yet.
            if entry.done():
                del self._entries[key]
                self._num_bytes -= entry.result().nbytes
