"""The cache of tensors: one read for each, bounded memory, errors that are not remembered."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reverie.common.v1.common_pb2 import TensorRef
from reverie_common.errors import ObjectNotFoundError
from reverie_common.storage import MemoryStore, put_tensor
from reverie_hidream.tensor_io import to_raw
from reverie_trainer.worker.tensor_cache import TensorCache


def _put(store: MemoryStore, key: str, value: float, size: int = 25) -> TensorRef:
    return put_tensor(store, key, "t", to_raw(torch.full((size,), value)), compressed=False)


def test_a_tensor_is_read_once(memory_store: MemoryStore) -> None:
    cache, ref = TensorCache(memory_store, max_bytes=1000), _put(memory_store, "a", 1.0)
    first = cache.get(ref)
    memory_store.delete("a")
    assert cache.get(ref) is first
    assert first.tolist() == [1.0] * 25


def test_the_least_recently_used_goes_first(memory_store: MemoryStore) -> None:
    cache = TensorCache(memory_store, max_bytes=200)
    refs = {key: _put(memory_store, key, 1.0) for key in "abc"}
    for key in "abac":
        cache.get(refs[key])
    assert cache.num_bytes == 200
    memory_store.delete("a")
    memory_store.delete("b")
    assert cache.get(refs["a"]).shape == (25,)
    with pytest.raises(ObjectNotFoundError):
        cache.get(refs["b"])


def test_a_tensor_larger_than_the_cache_is_handed_out(memory_store: MemoryStore) -> None:
    cache = TensorCache(memory_store, max_bytes=10)
    assert cache.get(_put(memory_store, "a", 2.0)).sum() == 50
    assert cache.num_bytes == 0


def test_an_error_is_not_remembered(memory_store: MemoryStore) -> None:
    cache, ref = TensorCache(memory_store, max_bytes=1000), _put(memory_store, "a", 1.0)
    body = memory_store.get("a")
    memory_store.delete("a")
    with pytest.raises(ObjectNotFoundError):
        cache.get(ref)
    memory_store.create("a", body)
    assert cache.get(ref).shape == (25,)


def test_threads_share_what_is_read(memory_store: MemoryStore) -> None:
    cache, ref = TensorCache(memory_store, max_bytes=1000), _put(memory_store, "a", 1.0)
    with ThreadPoolExecutor(8) as pool:
        tensors = list(pool.map(lambda _: cache.get(ref), range(32)))
    assert all(tensor is tensors[0] for tensor in tensors)
    assert cache.num_bytes == 100
