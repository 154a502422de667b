"""The safetensors format on raw bytes, without torch or numpy, so that the control plane can read and write it.

Format: 8 bytes of little-endian header length, a JSON header padded with spaces to 8 bytes, then the tensors' bytes
back to back. Reading checks everything that the reference implementation checks.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reverie_common.errors import IntegrityError

DTYPE_SIZE_BYTES: Mapping[str, int] = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

# The reference implementation's limit; a longer header is not one.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class RawTensor:
    """A tensor as it lies in memory: little-endian, row-major."""

    dtype: str
    """safetensors dtype name: `BF16`, `F32`, ..."""

    shape: tuple[int, ...]
    """Outermost dimension first; () is a scalar."""

    data: bytes | memoryview
    """product(shape) * itemsize bytes."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_SIZE_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is unknown; known are {', '.join(DTYPE_SIZE_BYTES)}")
        if any(size < 0 for size in self.shape):
            raise ValueError(f"shape {self.shape} has a negative dimension")
        size_bytes = math.prod(self.shape) * DTYPE_SIZE_BYTES[self.dtype]
        if self.size_bytes != size_bytes:
            raise ValueError(f"{self.dtype} {self.shape} needs {size_bytes} bytes, got {self.size_bytes}")

    @property
    def size_bytes(self) -> int:
        """Size of the data in bytes."""
        return self.data.nbytes if isinstance(self.data, memoryview) else len(self.data)


def pack_tensors(tensors: Mapping[str, RawTensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Write a safetensors file; the same tensors and metadata always give the same bytes.

    Tensors are ordered by falling item size and then by name, as the reference implementation does, so that each is
    aligned to its item size.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-DTYPE_SIZE_BYTES[item[1].dtype], item[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.size_bytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return b"".join([len(encoded).to_bytes(8, "little"), encoded, *(tensor.data for _, tensor in ordered)])


def unpack_tensors(body: bytes) -> dict[str, RawTensor]:
    """Read a safetensors file; each tensor's data is a view of `body`, not a copy.

    Raises:
        IntegrityError: the bytes are not a well-formed safetensors file.
    """
    header, data = _read_header(body)
    header.pop("__metadata__", None)
    tensors = {name: _slice_tensor(name, entry, data) for name, entry in header.items()}
    _require_no_gaps([entry["data_offsets"] for entry in header.values()], len(data))
    return tensors


def read_metadata(body: bytes) -> dict[str, str]:
    """Read the text metadata of a safetensors file; {} if it has none.

    Raises:
        IntegrityError: the bytes are not a well-formed safetensors file.
    """
    header, _ = _read_header(body)
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _malformed("__metadata__ is not an object of strings")
    return metadata


def _read_header(body: bytes) -> tuple[dict[str, Any], memoryview]:
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or length > min(MAX_HEADER_BYTES, len(body) - 8):
        raise _malformed(f"{len(body)} bytes cannot hold a header of {length}")
    try:
        header = json.loads(body[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise _malformed(f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _malformed("its header is not a JSON object")
    return header, memoryview(body)[8 + length :]


def _slice_tensor(name: str, entry: Any, data: memoryview) -> RawTensor:
    try:
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if not all(isinstance(number, int) for number in (start, end, *shape)) or not 0 <= start <= end <= len(data):
            raise ValueError(f"offsets {start}..{end} or shape {shape} are wrong for {len(data)} bytes")
        return RawTensor(dtype=entry["dtype"], shape=shape, data=data[start:end])
    except (KeyError, TypeError, ValueError) as error:
        raise _malformed(f"tensor {name!r}: {error}") from error


def _require_no_gaps(offsets: list[list[int]], size_bytes: int) -> None:
    # A gap or an overlap would let two files of different bytes mean the same, or hide bytes from a scan.
    expected = 0
    for start, end in sorted((start, end) for start, end in offsets):
        if start != expected:
            raise _malformed(f"a tensor starts at byte {start}, expected {expected}")
        expected = end
    if expected != size_bytes:
        raise _malformed(f"its tensors end at byte {expected} of {size_bytes}")


def _malformed(why: str) -> IntegrityError:
    return IntegrityError(f"not a safetensors file: {why}", reason="MALFORMED_SAFETENSORS")
