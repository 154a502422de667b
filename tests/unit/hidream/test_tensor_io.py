"""Tensors to bytes and back."""

import pytest
import torch
from reverie_common.storage.tensors import RawTensor, pack_tensors, unpack_tensors
from reverie_hidream.tensor_io import dtype_name, from_raw, to_raw
from safetensors.torch import load, save

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 5)], ids=str)
def test_round_trip_keeps_every_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.arange(30)[: torch.Size(shape).numel()].reshape(shape) * 3 - 7).to(dtype)
    restored = from_raw(to_raw(tensor))
    assert restored.dtype == dtype
    assert torch.equal(restored, tensor)


def test_agrees_with_safetensors_in_both_directions() -> None:
    tensor = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    ours = load(pack_tensors({"t": to_raw(tensor)}))["t"]
    theirs = from_raw(unpack_tensors(save({"t": tensor}))["t"])
    assert torch.equal(ours, tensor)
    assert torch.equal(theirs, tensor)


def test_transposed_tensors_are_stored_row_major() -> None:
    tensor = torch.arange(6).reshape(2, 3).T
    assert torch.equal(from_raw(to_raw(tensor)), tensor)


def test_keeps_nan_and_negative_zero() -> None:
    tensor = torch.tensor([float("nan"), -0.0, float("inf")])
    assert bytes(to_raw(from_raw(to_raw(tensor))).data) == bytes(to_raw(tensor).data)


def test_the_copy_is_writable_and_independent() -> None:
    raw = to_raw(torch.zeros(3))
    from_raw(raw).add_(1)
    assert torch.equal(from_raw(raw), torch.zeros(3))


def test_takes_a_tensor_that_needs_gradients() -> None:
    assert to_raw(torch.ones(2, requires_grad=True)).shape == (2,)


def test_refuses_dtypes_that_cannot_be_stored() -> None:
    with pytest.raises(ValueError, match="complex64"):
        dtype_name(torch.complex64)
    with pytest.raises(ValueError, match="'F8_E4M3' is not supported"):
        from_raw(RawTensor(dtype="F8_E4M3", shape=(1,), data=b"0"))
