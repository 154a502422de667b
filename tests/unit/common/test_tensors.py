"""Our safetensors reader and writer agree with the reference implementation and trust no header."""

import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from reverie_common.errors import IntegrityError
from reverie_common.storage import RawTensor, pack_tensors, read_metadata, unpack_tensors


def raw(array: np.ndarray, dtype: str) -> RawTensor:
    """A tensor of the bytes of an array."""
    return RawTensor(dtype=dtype, shape=array.shape, data=array.tobytes())


def forge(header: object, data: bytes = b"") -> bytes:
    """A file with any header."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ARRAYS: dict[str, tuple[np.ndarray, str]] = {
    "odd": (np.arange(3, dtype=np.int8), "I8"),
    "floats": (np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3), "F32"),
    "scalar": (np.array(7, dtype=np.int64), "I64"),
    "empty": (np.zeros((0, 4), dtype=np.float16), "F16"),
}


def test_reads_what_it_wrote() -> None:
    tensors = {name: raw(array, dtype) for name, (array, dtype) in ARRAYS.items()}
    tensors["half"] = RawTensor(dtype="BF16", shape=(2, 2), data=memoryview(b"abcdefgh"))

    read = unpack_tensors(pack_tensors(tensors))

    assert {name: (each.dtype, each.shape, bytes(each.data)) for name, each in read.items()} == {
        name: (each.dtype, each.shape, bytes(each.data)) for name, each in tensors.items()
    }


def test_writes_the_bytes_of_the_reference_implementation() -> None:
    ours = pack_tensors({name: raw(array, dtype) for name, (array, dtype) in ARRAYS.items()})
    theirs = safetensors.numpy.save({name: array for name, (array, _) in ARRAYS.items()})
    assert ours == theirs


def test_the_reference_implementation_reads_what_it_wrote() -> None:
    body = pack_tensors({name: raw(array, dtype) for name, (array, dtype) in ARRAYS.items()}, {"title": "caf\u00e9"})
    read = safetensors.numpy.load(body)
    assert {name: array.tolist() for name, array in read.items()} == {
        name: array.tolist() for name, (array, _) in ARRAYS.items()
    }


def test_reads_what_the_reference_implementation_wrote() -> None:
    body = safetensors.numpy.save({"a": np.ones((2, 3), dtype=np.float32)}, {"k": "v"})
    assert read_metadata(body) == {"k": "v"}
    assert unpack_tensors(body)["a"].shape == (2, 3)


def test_same_tensors_in_any_order_give_same_bytes() -> None:
    first, second = raw(np.zeros(2, np.float32), "F32"), raw(np.ones(2, np.float32), "F32")
    assert pack_tensors({"a": first, "b": second}, {"x": "1", "y": "2"}) == pack_tensors(
        {"b": second, "a": first}, {"y": "2", "x": "1"}
    )


def test_tensors_are_aligned_to_their_items() -> None:
    body = pack_tensors({"a": raw(np.zeros(3, np.int8), "I8"), "b": raw(np.zeros(1, np.float64), "F64")})
    assert int.from_bytes(body[:8], "little") % 8 == 0
    assert json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["b"]["data_offsets"] == [0, 8]


def test_reading_copies_no_data() -> None:
    body = pack_tensors({"a": raw(np.zeros(3, np.float32), "F32")})
    data = unpack_tensors(body)["a"].data
    assert isinstance(data, memoryview)
    assert data.obj is body


def test_a_file_without_metadata_has_none() -> None:
    assert read_metadata(pack_tensors({})) == {}


def entry(start: int, end: int, shape: list[int]) -> dict[str, object]:
    """A header entry of bytes."""
    return {"dtype": "U8", "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x01\x02",
        (1 << 62).to_bytes(8, "little"),
        (4).to_bytes(8, "little") + b"nope",
        forge([]),
        forge({"a": {}}),
        forge({"a": []}),
        forge({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 1]}}, b"x"),
        forge({"a": {"dtype": "U8", "shape": ["1"], "data_offsets": [0, 1]}}, b"x"),
        forge({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}}, b"x"),
        forge({"a": {"dtype": "U8", "shape": 1, "data_offsets": [0, 1]}}, b"x"),
        forge({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"x"),
        forge({"a": entry(0, 2, [1])}, b"xy"),
        forge({"a": entry(0, 9, [9])}, b"xy"),
        forge({"a": entry(-2, 0, [2])}, b"xy"),
        forge({"a": entry(1, 2, [1])}, b"xy"),
        forge({"a": entry(0, 1, [1])}, b"xy"),
        forge({"a": entry(0, 2, [2]), "b": entry(0, 2, [2])}, b"xy"),
    ],
)
def test_refuses_files_that_are_not_well_formed(body: bytes) -> None:
    with pytest.raises(IntegrityError) as caught:
        unpack_tensors(body)
    assert caught.value.reason == "MALFORMED_SAFETENSORS"


def test_refuses_metadata_that_is_not_text() -> None:
    with pytest.raises(IntegrityError):
        read_metadata(forge({"__metadata__": {"a": 1}}))


@pytest.mark.parametrize(
    ("dtype", "shape", "data"), [("F32", (2,), b"1234"), ("float", (1,), b"1234"), ("U8", (-1, -1), b"x")]
)
def test_refuses_tensors_that_cannot_be(dtype: str, shape: tuple[int, ...], data: bytes) -> None:
    with pytest.raises(ValueError, match=r"needs|unknown|negative"):
        RawTensor(dtype=dtype, shape=shape, data=data)
