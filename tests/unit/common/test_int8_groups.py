"""The compact encoding against a plain float64 loop, torch, and what must not happen to bytes in a store."""

import math

import numpy as np
import pytest
import torch
from reverie.common.v1.common_pb2 import TensorRef
from reverie_common.errors import IntegrityError, InvalidArgumentError
from reverie_common.storage import MemoryStore, RawTensor, get_tensor, put_tensor, tensor_ref_if_present
from reverie_common.storage.int8_groups import GROUP_SIZE, decode, encode
from reverie_common.storage.keys import reference_key
from reverie_common.storage.refs import INT8_GROUPS
from reverie_hidream.tensor_io import from_raw, to_raw

KEY = "v1/text/f/00/key"


def heavy_tailed(*shape: int, seed: int = 0) -> torch.Tensor:
    """Like Llama's hidden states: a few channels hundreds of times the median, a huge first token, one group of 0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    values[..., :3] *= 30.0
    values[..., 0, :] *= 3000.0
    values[..., -1, :GROUP_SIZE] = 0.0
    return values


def plain(tensor: torch.Tensor) -> tuple[list[float], float]:
    """Values after encoding, and the relative error, by loops over Python floats."""
    width = tensor.shape[-1]
    restored, difference, norm = [], 0.0, 0.0
    for row in tensor.reshape(-1, width).double().tolist():
        for start in range(0, width, GROUP_SIZE):
            group = row[start : start + GROUP_SIZE]
            scale = nearest_bfloat16(max(map(abs, group)) / 127)
            for value in group:
                step = max(-127, min(127, round(value / scale))) if scale else 0
                new = step * scale
                new = nearest_bfloat16(new) if tensor.dtype == torch.bfloat16 else new
                restored.append(new)
                difference += (new - value) ** 2
                norm += value**2
    return restored, math.sqrt(difference / norm)


def nearest_bfloat16(value: float) -> float:
    if value == 0:
        return 0.0
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 256), exponent - 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [96, 80, 7], ids=["whole groups", "a short last group", "less than a group"])
def test_equals_a_plain_loop(dtype: torch.dtype, width: int) -> None:
    tensor = heavy_tailed(2, 5, width).to(dtype)
    encoded = encode(to_raw(tensor))
    restored = from_raw(decode(encoded.values, encoded.scales, to_raw(tensor).dtype))
    expected, error = plain(tensor)
    assert restored.dtype == dtype
    assert restored.flatten().double().tolist() == expected
    assert encoded.relative_error == pytest.approx(error, rel=1e-12)
    assert encoded.scales.shape == (2, 5, -(-width // GROUP_SIZE))


def test_decoding_is_int8_times_scale_in_torch_too() -> None:
    tensor = heavy_tailed(3, 128, 256).bfloat16()
    encoded = encode(to_raw(tensor))
    groups = from_raw(encoded.values).unflatten(-1, (-1, GROUP_SIZE)).to(torch.bfloat16)
    expected = (groups * from_raw(encoded.scales)[..., None]).flatten(-2)
    assert torch.equal(from_raw(decode(encoded.values, encoded.scales, "BF16")), expected)


def test_error_stays_near_one_percent_where_a_scale_for_each_layer_destroys_the_small_channels() -> None:
    tensor = heavy_tailed(4, 128, 512)
    encoded = encode(to_raw(tensor))
    restored = from_raw(decode(encoded.values, encoded.scales, "F32"))
    by_layer = tensor.abs().amax(dim=(-2, -1), keepdim=True) / 127
    coarse = torch.round(tensor / by_layer) * by_layer

    def median_error(other: torch.Tensor) -> float:
        per_token = torch.linalg.vector_norm(other - tensor, dim=-1) / torch.linalg.vector_norm(tensor, dim=-1)
        return float(per_token.median())

    assert median_error(restored) < 0.01
    assert median_error(coarse) > 0.5


def test_zeros_and_tiny_values_are_no_noise() -> None:
    tensor = torch.zeros(4, 64)
    tensor[1, 0], tensor[2, 40] = 1e-44, -3e38
    encoded = encode(to_raw(tensor))
    restored = from_raw(decode(encoded.values, encoded.scales, "F32"))
    assert torch.equal(restored == 0, tensor.abs() < 1)
    assert restored[2, 40] == pytest.approx(-3e38, rel=0.01)
    assert encode(to_raw(torch.zeros(2, 32))).relative_error == 0.0


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        encode(to_raw(torch.tensor([[1.0, value]])))
    assert refusal.value.reason == "NON_FINITE_TENSOR"


def test_refuses_other_dtypes_and_scalars() -> None:
    for tensor in (torch.tensor(1.0), torch.ones(2, 2, dtype=torch.int32)):
        with pytest.raises(InvalidArgumentError) as refusal:
            encode(to_raw(tensor))
        assert refusal.value.reason == "UNSUPPORTED_ENCODING"


def test_a_stored_tensor_comes_back_in_its_dtype_with_its_error(memory_store: MemoryStore) -> None:
    tensor = heavy_tailed(3, 128, 128).bfloat16()
    ref = put_tensor(memory_store, KEY, "embedding", to_raw(tensor), compressed=False, encoding=INT8_GROUPS)
    restored = from_raw(get_tensor(memory_store, ref))
    exact = put_tensor(memory_store, f"{KEY}-exact", "embedding", to_raw(tensor), compressed=False)
    assert (ref.encoding, ref.dtype, tuple(ref.shape)) == (INT8_GROUPS, "BF16", (3, 128, 128))
    measured = torch.linalg.vector_norm(restored.double() - tensor.double()) / torch.linalg.vector_norm(tensor.double())
    assert ref.relative_error == pytest.approx(float(measured), rel=1e-9)
    assert 0 < ref.relative_error < 0.011
    assert ref.size_bytes < 0.54 * exact.size_bytes
    assert tensor_ref_if_present(memory_store, KEY) == ref
    assert (exact.encoding, exact.relative_error) == ("", 0.0)


def test_a_companion_that_was_lost_is_made_again_with_the_error(memory_store: MemoryStore) -> None:
    tensor = to_raw(heavy_tailed(1, 8, 64))
    ref = put_tensor(memory_store, KEY, "embedding", tensor, compressed=True, encoding=INT8_GROUPS)
    memory_store.delete(reference_key(KEY))
    assert put_tensor(memory_store, KEY, "embedding", tensor, compressed=True, encoding=INT8_GROUPS) == ref


def test_an_encoding_of_a_newer_version_is_refused_by_name(memory_store: MemoryStore) -> None:
    ref = put_tensor(memory_store, KEY, "x", to_raw(torch.ones(2)), compressed=False)
    with pytest.raises(InvalidArgumentError, match="int3-of-the-future"):
        get_tensor(
            memory_store, TensorRef(uri=ref.uri, name="x", dtype="F32", shape=[2], encoding="int3-of-the-future")
        )


def test_parts_that_do_not_belong_together_are_damage() -> None:
    encoded = encode(to_raw(torch.ones(2, 64)))
    wrong = RawTensor(dtype="BF16", shape=(2, 1), data=np.zeros(4, np.uint8).data)
    with pytest.raises(IntegrityError):
        decode(encoded.values, wrong, "BF16")
