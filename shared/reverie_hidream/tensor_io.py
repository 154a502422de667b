"""torch tensors as the raw tensors of the object store, and back, bit for bit."""

import torch
from reverie_common.storage.tensors import RawTensor

_DTYPE_OF_NAME = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAME_OF_DTYPE = {dtype: name for name, dtype in _DTYPE_OF_NAME.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a dtype, for instance "BF16".

    Raises:
        ValueError: safetensors has no such dtype.
    """
    if dtype not in _NAME_OF_DTYPE:
        raise ValueError(f"dtype {dtype} cannot be stored; use one of {', '.join(map(str, _NAME_OF_DTYPE))}")
    return _NAME_OF_DTYPE[dtype]


def to_raw(tensor: torch.Tensor) -> RawTensor:
    """View a tensor of any device as raw bytes.

    A contiguous CPU tensor is not copied: do not change it while the raw tensor is in use.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return RawTensor(
        dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), data=flat.view(torch.uint8).numpy().data
    )


def from_raw(raw: RawTensor) -> torch.Tensor:
    """Copy a raw tensor into a new CPU tensor of the same dtype and shape.

    Raises:
        ValueError: torch has no such dtype.
    """
    if raw.dtype not in _DTYPE_OF_NAME:
        raise ValueError(f"dtype {raw.dtype!r} is not supported; known are {', '.join(_DTYPE_OF_NAME)}")
    tensor = torch.empty(raw.shape, dtype=_DTYPE_OF_NAME[raw.dtype])
    if tensor.numel():
        tensor.reshape(-1).view(torch.uint8).numpy().data[:] = raw.data
    return tensor
