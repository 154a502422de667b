"""The lossy encoding `int8-groups-32`: int8 with one bfloat16 scale for each 32 neighbouring values of a token.

Llama's hidden states have channels that are hundreds of times larger than the rest, and a first token that is larger
still. One scale for a layer spends all 255 steps on those; one for 32 channels of one token does not.

In a safetensors object the tensor `x` lies as `x.int8`, of its own shape, and `x.scale`, whose last dimension is the
number of groups; the last group of a token may be shorter. A value is int8 times scale, rounded to nearest, ties to
even, if the tensor is bfloat16. Groups of zeros stay zeros. 1.06 bytes a value.

Needs numpy, which the control plane does not have: import it where tensors are read or written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from reverie_common.errors import IntegrityError, InvalidArgumentError
from reverie_common.storage.tensors import RawTensor

GROUP_SIZE = 32

_LARGEST = 127

# A block of float32 of this many values stays in a core's cache through all passes over it.
_BLOCK_VALUES = 1 << 15

Floats = npt.NDArray[np.float32]
Quantised = npt.NDArray[np.int8]
Bits = npt.NDArray[np.uint16]
"""bfloat16 as its bits: numpy has no such type."""

Numbers = npt.NDArray[Any]
"""Floats or Bits."""

_NUMPY_TYPES: Mapping[str, npt.DTypeLike] = {"BF16": np.uint16, "F32": np.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedTensor:
    """A tensor as int8 and scales."""

    values: RawTensor
    """I8, of the tensor's shape."""

    scales: RawTensor
    """BF16, of the tensor's shape but for the last dimension: ceil(size / 32)."""

    relative_error: float
    """Norm of the difference over norm, over the whole tensor, in float64; 0 for a tensor of zeros."""

    def tensors(self, name: str) -> Mapping[str, RawTensor]:
        """The two under the names that they have in an object."""
        return {values_name(name): self.values, scales_name(name): self.scales}


def values_name(name: str) -> str:
    """Name of the int8 part of a tensor."""
    return f"{name}.int8"


def scales_name(name: str) -> str:
    """Name of the scales of a tensor."""
    return f"{name}.scale"


def encode(tensor: RawTensor) -> EncodedTensor:
    """Encode a tensor of at least one dimension. Deterministic.

    Raises:
        InvalidArgumentError: it is neither BF16 nor F32, or holds an infinity or NaN.
    """
    rows = _rows(tensor)
    num_rows, width = rows.shape
    values = np.empty((num_rows, width), np.int8)
    scales = np.empty((num_rows, _num_groups(width)), np.uint16)
    difference = norm = 0.0
    decoder = _Decoder(tensor.dtype, width)
    restored = np.empty(rows[: _rows_in_block(width)].shape, rows.dtype)
    for block in _blocks(num_rows, width):
        exact = _to_floats(rows[block])
        values[block], scales[block] = _encode_block(exact)
        decoder.decode(values[block], scales[block], restored[: len(exact)])
        delta = _to_floats(restored[: len(exact)]).astype(np.float64) - exact
        difference += float(np.vdot(delta, delta))
        norm += float(np.vdot(exact.astype(np.float64), exact))
    return EncodedTensor(
        values=RawTensor(dtype="I8", shape=tensor.shape, data=_bytes_of(values)),
        scales=RawTensor(dtype="BF16", shape=_scale_shape(tensor.shape), data=_bytes_of(scales)),
        relative_error=(difference / norm) ** 0.5 if norm else 0.0,
    )


def decode(values: RawTensor, scales: RawTensor, dtype: str) -> RawTensor:
    """Give back a tensor of `dtype`, BF16 or F32.

    Raises:
        IntegrityError: the two parts do not belong together.
    """
    if values.dtype != "I8" or scales.dtype != "BF16" or scales.shape != _scale_shape(values.shape):
        raise IntegrityError(
            f"a tensor in int8 groups has values {values.dtype} {list(values.shape)} and scales {scales.dtype} "
            f"{list(scales.shape)}; delete the object and let it be made again",
            reason="MALFORMED_ENCODING",
        )
    width = values.shape[-1]
    quantised = np.frombuffer(values.data, np.int8).reshape(-1, width)
    bits = np.frombuffer(scales.data, np.uint16).reshape(-1, _num_groups(width))
    restored = np.empty(quantised.shape, _NUMPY_TYPES[dtype])
    decoder = _Decoder(dtype, width)
    for block in _blocks(*quantised.shape):
        decoder.decode(quantised[block], bits[block], restored[block])
    return RawTensor(dtype=dtype, shape=values.shape, data=_bytes_of(restored))


def _rows(tensor: RawTensor) -> Numbers:
    if tensor.dtype not in _NUMPY_TYPES or not tensor.shape or not tensor.shape[-1]:
        raise InvalidArgumentError(
            f"{tensor.dtype} {list(tensor.shape)} cannot be stored in int8 groups, only vectors of "
            f"{' or '.join(_NUMPY_TYPES)}; store it exactly",
            reason="UNSUPPORTED_ENCODING",
        )
    return np.frombuffer(tensor.data, _NUMPY_TYPES[tensor.dtype]).reshape(-1, tensor.shape[-1])


def _encode_block(exact: Floats) -> tuple[Quantised, Bits]:
    """(rows, width) to int8 (rows, width) and the bits of the scales (rows, groups)."""
    num_rows, width = exact.shape
    padding = -width % GROUP_SIZE
    groups = np.pad(exact, ((0, 0), (0, padding))).reshape(num_rows, -1, GROUP_SIZE)
    largest = np.abs(groups).max(axis=-1)
    if not np.isfinite(largest).all():
        raise InvalidArgumentError(
            "a tensor with infinities or NaN cannot be stored in int8 groups; check the model that made it",
            reason="NON_FINITE_TENSOR",
        )
    unrounded = largest / np.float32(_LARGEST)
    bits = _round_to_bfloat16(unrounded, np.empty(unrounded.shape, np.uint32)).astype(np.uint16)
    scales = _to_floats(bits)[..., None]
    # Where the scale is 0 so are, to its precision, all values.
    steps = np.divide(groups, scales, out=np.zeros_like(groups), where=scales > 0)
    quantised = np.clip(np.rint(steps), -_LARGEST, _LARGEST).astype(np.int8)
    return quantised.reshape(num_rows, -1)[:, :width], bits


class _Decoder:
    """Decodes blocks of rows in scratch memory that stays in the cache; fresh memory would cost 5 times the work."""

    def __init__(self, dtype: str, width: int) -> None:
        self._is_exact = dtype == "F32"
        self._width = width
        self._floats = np.empty((_rows_in_block(width), width), np.float32)
        self._odd = np.empty(self._floats.shape, np.uint32)

    def decode(self, values: Quantised, scale_bits: Bits, out: Numbers) -> None:
        """Write (rows, width) values. Exact in float32: 7 bits times 8 bits are 15; then one rounding to bfloat16."""
        floats = out.view(np.float32) if self._is_exact else self._floats[: len(values)]
        scales = _to_floats(scale_bits)
        if self._width % GROUP_SIZE == 0:
            grouped = floats.reshape(-1, GROUP_SIZE)
            np.multiply(values.reshape(-1, GROUP_SIZE), scales.reshape(-1, 1), out=grouped)
        else:
            np.multiply(values, np.repeat(scales, GROUP_SIZE, axis=-1)[:, : self._width], out=floats)
        if not self._is_exact:
            out[...] = _round_to_bfloat16(floats, self._odd[: len(values)])


def _to_floats(values: Numbers) -> Floats:
    if values.dtype == np.float32:
        return values.view(np.float32)
    return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _round_to_bfloat16(values: Floats, scratch: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Bits of the nearest bfloat16, ties to even, in the memory of the values, which are finite."""
    bits = values.view(np.uint32)
    np.right_shift(bits, np.uint32(16), out=scratch)
    scratch &= np.uint32(1)
    scratch += np.uint32(0x7FFF)
    bits += scratch
    bits >>= np.uint32(16)
    return bits


def _blocks(num_rows: int, width: int) -> list[slice]:
    size = _rows_in_block(width)
    return [slice(start, start + size) for start in range(0, num_rows, size)]


def _rows_in_block(width: int) -> int:
    return max(1, _BLOCK_VALUES // width)


def _num_groups(width: int) -> int:
    return -(-width // GROUP_SIZE)


def _scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], _num_groups(shape[-1]))


def _bytes_of(array: Numbers) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
