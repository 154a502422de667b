"""Checkpoints: whole or not there, never overwritten, pruned manifest first."""

import json
from threading import Event, Thread

import pytest
from reverie.common.v1.common_pb2 import ObjectRef
from reverie_common.errors import IntegrityError, ReverieError, StoreFullError
from reverie_common.storage import MemoryStore, RawTensor, get_object
from reverie_common.storage.keys import checkpoint_manifest_key, checkpoint_prefix
from reverie_trainer.worker.checkpoints import (
    CheckpointContents,
    CheckpointSaver,
    SavedCheckpoint,
    prune_checkpoints,
    read_checkpoint,
    read_state,
    write_checkpoint,
)

JOB = "job-1"


class FullStore(MemoryStore):
    """A store whose room ends after so many objects."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def create(self, key: str, body: object, *, media_type: str = "") -> bool:
        if self.room == 0:
            raise StoreFullError("no room is left")
        self.room -= 1
        return super().create(key, bytes(body), media_type=media_type)  # type: ignore[call-overload]


def _contents(step: int = 4, adapter: bytes = b"adapter") -> CheckpointContents:
    state = {"optimizer/0.step": RawTensor(dtype="F32", shape=(1,), data=b"\0\0\x80?")}
    return CheckpointContents(
        step=step, adapter_file=adapter, state=state, metrics=b'{"step": 4}\n', scalars={"pictures": [{"step": 0}]}
    )


def _ref(store: MemoryStore, step: int) -> ObjectRef:
    return ObjectRef(uri=store.uri(checkpoint_manifest_key(JOB, step)))


def test_what_is_written_is_read(memory_store: MemoryStore) -> None:
    write_checkpoint(memory_store, JOB, _contents())
    checkpoint = read_checkpoint(memory_store, _ref(memory_store, 4))
    assert (checkpoint.step, checkpoint.scalars) == (4, {"pictures": [{"step": 0}]})
    assert get_object(memory_store, checkpoint.adapter) == b"adapter"
    assert get_object(memory_store, checkpoint.metrics) == b'{"step": 4}\n'
    assert bytes(read_state(memory_store, checkpoint)["optimizer/0.step"].data) == b"\0\0\x80?"


@pytest.mark.parametrize("room", range(4))
def test_a_checkpoint_that_was_cut_off_does_not_exist(room: int) -> None:
    store = FullStore(room)
    with pytest.raises(StoreFullError):
        write_checkpoint(store, JOB, _contents())
    assert not store.head(checkpoint_manifest_key(JOB, 4))


def test_a_step_that_is_saved_already_is_kept(memory_store: MemoryStore) -> None:
    write_checkpoint(memory_store, JOB, _contents(adapter=b"first"))
    again = write_checkpoint(memory_store, JOB, _contents(adapter=b"second"))
    assert get_object(memory_store, again.adapter) == b"first"


def test_the_oldest_are_pruned_and_what_was_left_unfinished_before_them(memory_store: MemoryStore) -> None:
    for step in (2, 4, 6, 8):
        write_checkpoint(memory_store, JOB, _contents(step))
    memory_store.create(f"{checkpoint_prefix(JOB)}000000003/state/orphan", b"x")
    memory_store.create(f"{checkpoint_prefix(JOB)}000000009/state/being-written", b"x")
    assert prune_checkpoints(memory_store, JOB, 2) == [2, 4]
    steps = {item.key.removeprefix(checkpoint_prefix(JOB)).split("/")[0] for item in memory_store.list("v1/job")}
    assert steps == {"000000006", "000000008", "000000009"}


def test_keep_0_keeps_all(memory_store: MemoryStore) -> None:
    for step in (2, 4):
        write_checkpoint(memory_store, JOB, _contents(step))
    assert prune_checkpoints(memory_store, JOB, 0) == []


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", json.dumps({"format": 2, "step": 1, "parts": {}, "scalars": {}}).encode()]
)
def test_a_manifest_that_is_none_is_refused(memory_store: MemoryStore, body: bytes) -> None:
    memory_store.create(checkpoint_manifest_key(JOB, 4), body)
    with pytest.raises(IntegrityError):
        read_checkpoint(memory_store, _ref(memory_store, 4))


def test_the_saver_tells_what_became_of_a_save() -> None:
    saved: list[SavedCheckpoint] = []
    failed: list[tuple[int, ReverieError]] = []
    saver = CheckpointSaver(
        FullStore(4), JOB, keep=0, on_saved=saved.append, on_failed=lambda *failure: failed.append(failure)
    )
    saver.save(_contents(2))
    saver.save(_contents(4, b"other"))
    saver.close()
    assert [checkpoint.step for checkpoint in saved] == [2]
    assert [(step, error.reason) for step, error in failed] == [(4, "STORE_FULL")]


def test_the_saver_holds_two_checkpoints_at_most(memory_store: MemoryStore) -> None:
    gate, third_is_in = Event(), Event()

    def hold(_: SavedCheckpoint) -> None:
        gate.wait(10)

    saver = CheckpointSaver(memory_store, JOB, keep=0, on_saved=hold, on_failed=lambda *_: None)

    def save_third() -> None:
        saver.save(_contents(3))
        third_is_in.set()

    saver.save(_contents(1))
    saver.save(_contents(2))
    third = Thread(target=save_third)
    third.start()
    assert not third_is_in.wait(0.2)
    gate.set()
    assert third_is_in.wait(10)
    third.join()
    saver.close()
