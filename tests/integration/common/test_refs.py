"""References name what was written, whoever wrote it first."""

import pytest
from reverie.common.v1.common_pb2 import ObjectRef, TensorRef
from reverie_common.errors import IntegrityError, InvalidArgumentError, ObjectNotFoundError
from reverie_common.storage import (
    ObjectStore,
    RawTensor,
    get_object,
    get_tensor,
    put_object,
    put_tensor,
    tensor_ref_if_present,
)
from reverie_common.storage.keys import reference_key

TENSOR = RawTensor(dtype="BF16", shape=(2, 300), data=b"\x12\x3f" * 600)
OTHER = RawTensor(dtype="BF16", shape=(2, 300), data=b"\x13\x3f" * 600)


@pytest.fixture(params=["s3", "memory"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    """An empty store of either kind."""
    found: ObjectStore = request.getfixturevalue(f"{request.param}_store")
    return found


def test_an_object_is_read_by_its_reference(store: ObjectStore) -> None:
    ref = put_object(store, "a", b"hello", "text/plain")
    assert (ref.uri, ref.size_bytes, ref.media_type) == (store.uri("a"), 5, "text/plain")
    assert get_object(store, ref) == b"hello"


def test_a_reference_is_to_the_object_that_was_first(store: ObjectStore) -> None:
    put_object(store, "a", b"first")
    ref = put_object(store, "a", b"second one")
    assert ref.size_bytes == 5
    assert get_object(store, ref) == b"first"


def test_an_object_that_was_damaged_is_refused(store: ObjectStore) -> None:
    ref = put_object(store, "a", b"hello")
    store.replace("a", b"hellO")
    with pytest.raises(IntegrityError):
        get_object(store, ref)


def test_a_reference_to_another_store_is_refused(store: ObjectStore) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        get_object(store, ObjectRef(uri="s3://elsewhere/a"))
    assert caught.value.reason == "FOREIGN_URI"


@pytest.mark.parametrize("compressed", [True, False])
def test_a_tensor_is_read_by_its_reference(store: ObjectStore, compressed: bool) -> None:
    ref = put_tensor(store, "t", "hidden", TENSOR, compressed=compressed)
    assert (ref.name, ref.dtype, list(ref.shape)) == ("hidden", "BF16", [2, 300])
    assert ref.size_bytes == len(store.get("t"))
    read = get_tensor(store, ref)
    assert (read.dtype, read.shape, bytes(read.data)) == ("BF16", (2, 300), TENSOR.data)


def test_compressed_tensors_are_smaller(store: ObjectStore) -> None:
    small = put_tensor(store, "small", "t", TENSOR, compressed=True)
    plain = put_tensor(store, "plain", "t", TENSOR, compressed=False)
    assert small.size_bytes < plain.size_bytes


def test_a_tensor_that_is_there_is_found_without_reading_it(store: ObjectStore) -> None:
    assert tensor_ref_if_present(store, "t") is None
    ref = put_tensor(store, "t", "hidden", TENSOR, compressed=True)
    assert tensor_ref_if_present(store, "t") == ref


def test_the_first_writer_of_a_tensor_decides(store: ObjectStore) -> None:
    first = put_tensor(store, "t", "hidden", TENSOR, compressed=True)
    second = put_tensor(store, "t", "hidden", OTHER, compressed=True)
    assert second == first
    assert bytes(get_tensor(store, second).data) == TENSOR.data


def test_a_writer_that_died_between_tensor_and_reference_is_made_good(store: ObjectStore) -> None:
    first = put_tensor(store, "t", "hidden", TENSOR, compressed=True)
    store.delete(reference_key("t"))
    second = put_tensor(store, "t", "hidden", OTHER, compressed=True)
    assert second == first == tensor_ref_if_present(store, "t")


def test_a_damaged_tensor_is_refused(store: ObjectStore) -> None:
    ref = put_tensor(store, "t", "hidden", TENSOR, compressed=True)
    store.replace("t", store.get("t")[:-1])
    with pytest.raises(IntegrityError):
        get_tensor(store, ref)


def test_a_tensor_that_is_gone_is_named(store: ObjectStore) -> None:
    ref = put_tensor(store, "t", "hidden", TENSOR, compressed=True)
    store.delete("t")
    with pytest.raises(ObjectNotFoundError):
        get_tensor(store, ref)


@pytest.mark.parametrize("change", [{"name": "other"}, {"dtype": "F16"}, {"shape": [600]}])
def test_a_reference_that_does_not_fit_is_refused(store: ObjectStore, change: dict[str, object]) -> None:
    ref = put_tensor(store, "t", "hidden", TENSOR, compressed=False)
    fields = {"uri": ref.uri, "name": ref.name, "dtype": ref.dtype, "shape": list(ref.shape), **change}
    with pytest.raises(IntegrityError):
        get_tensor(store, TensorRef(**fields))  # type: ignore[arg-type]  # fields of several types


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b'{"uri": 3}', b'{"unknown": ""}'])
def test_a_damaged_companion_is_refused(store: ObjectStore, body: bytes) -> None:
    store.replace(reference_key("t"), body)
    with pytest.raises(IntegrityError) as caught:
        tensor_ref_if_present(store, "t")
    assert caught.value.metadata["key"] == "t.ref"
