"""DerivedTensors: memory, then the store, then one computation."""

import asyncio

import pytest
from reverie.common.v1.common_pb2 import TensorRef
from reverie_common.storage import MemoryStore, RawTensor, put_tensor
from reverie_common.storage.derived import DerivedTensors
from reverie_common.storage.keys import reference_key

KEY = "v1/text/f/ab/abcd"


class Maker:
    """Stores a tensor under a key and counts."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.num_made = 0
        self.error: Exception | None = None

    async def make(self, key: str = KEY) -> TensorRef:
        self.num_made += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return put_tensor(self.store, key, "t", RawTensor(dtype="U8", shape=(2,), data=b"ab"), compressed=False)


@pytest.fixture
def maker(memory_store: MemoryStore) -> Maker:
    return Maker(memory_store)


async def test_makes_once_and_then_remembers(memory_store: MemoryStore, maker: Maker) -> None:
    derived = DerivedTensors(memory_store)
    first, second = [await derived.get(KEY, maker.make) for _ in range(2)]
    assert (first.cached, second.cached, maker.num_made) == (False, True, 1)
    assert first.ref == second.ref


async def test_finds_what_another_process_made(memory_store: MemoryStore, maker: Maker) -> None:
    made = await DerivedTensors(memory_store).get(KEY, maker.make)
    found = await DerivedTensors(memory_store).get(KEY, maker.make)
    assert (found.cached, found.ref, maker.num_made) == (True, made.ref, 1)


async def test_concurrent_callers_share_one_computation(memory_store: MemoryStore, maker: Maker) -> None:
    derived = DerivedTensors(memory_store)
    results = await asyncio.gather(*(derived.get(KEY, maker.make) for _ in range(6)))
    assert maker.num_made == 1
    assert sum(not result.cached for result in results) == 1


async def test_an_error_is_not_remembered(memory_store: MemoryStore, maker: Maker) -> None:
    derived = DerivedTensors(memory_store)
    maker.error = ValueError("not now")
    with pytest.raises(ValueError, match="not now"):
        await derived.get(KEY, maker.make)
    maker.error = None
    assert not (await derived.get(KEY, maker.make)).cached


async def test_forgets_the_least_recently_used(memory_store: MemoryStore, maker: Maker) -> None:
    derived = DerivedTensors(memory_store, capacity=2)
    for key in ("v1/a", "v1/b", "v1/a", "v1/c"):
        await derived.get(key, lambda key=key: maker.make(key))  # type: ignore[misc]  # mypy and default arguments
    for key in ("v1/a", "v1/b", "v1/c"):
        memory_store.delete(reference_key(key))
    again = [await derived.get(key, lambda key=key: maker.make(key)) for key in ("v1/a", "v1/c", "v1/b")]  # type: ignore[misc]
    assert [result.cached for result in again] == [True, True, False]
