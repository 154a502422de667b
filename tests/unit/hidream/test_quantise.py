"""Every precision: frozen, as close and as small as its format says, with gradients where the table promises them."""

import logging
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from optimum.quanto import QLinear
from reverie_hidream.precisions import BASE_PRECISIONS, ENCODER_PRECISIONS, PRECISIONS, REFUSED, refusal
from reverie_hidream.quantise import check_precision, quantise, weight_bytes
from torch import nn

ON_CPU = tuple(name for name, precision in PRECISIONS.items() if "cpu" in precision.device_types)

# Relative error of normally distributed weights, from below and above. Symmetric uniform steps of the largest of n
# weights: 2 max / 255 / sqrt(12) for int8, max about sqrt(2 ln n); e4m3 has 3 bits of mantissa: 2^-4 / sqrt(3) at most,
# less where the mantissa is small; 4 bits: one of 16 steps over the range of a group.
ERRORS = {
    "no_change": (0.0, 0.0),
    "int8-quanto": (0.003, 0.012),
    "int4-quanto": (0.05, 0.12),
    "int2-quanto": (0.25, 0.6),
    "fp8-quanto": (0.015, 0.036),
    "fp8uz-quanto": (0.015, 0.036),
    "int8-torchao": (0.003, 0.012),
    "fp8wo-torchao": (0.015, 0.036),
    "nf4-bnb": (0.05, 0.12),
    "int8dq-torchao": (0.003, 0.02),
    "int4-torchao": (0.05, 0.12),
}


def model(*widths: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Linears of the widths, one after another, with normally distributed weights."""
    layers = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(widths[0]))
    return layers.to(dtype)


def seen_weight(linear: Any, width: int) -> torch.Tensor:
    """The weight that the products compute with: the answer to the identity, less the bias. (out, width)"""
    with torch.no_grad():
        answer: torch.Tensor = linear(torch.eye(width, dtype=linear.bias.dtype)) - linear.bias
    return answer.T.double()


@pytest.mark.parametrize("precision", ON_CPU)
def test_freezes_every_parameter(precision: str) -> None:
    module = model(64, 128, 64)
    quantise(module, precision)
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ON_CPU)
def test_weights_are_as_close_as_their_format(precision: str, dtype: torch.dtype) -> None:
    module = model(256, 128, dtype=dtype)
    expected = next(module.parameters()).detach().double()
    quantise(module, precision)
    error = float((seen_weight(module[0], 256) - expected).norm() / expected.norm())
    low, high = ERRORS[precision]
    # Taking the bias off again rounds in bfloat16.
    assert low <= error <= high + (0.004 if dtype is torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("precision", [name for name in ON_CPU if name != "no_change"])
def test_memory_is_what_the_table_says(precision: str) -> None:
    module = model(512, 512, dtype=torch.bfloat16)
    num_weights = 512 * 512
    assert weight_bytes(module) == 2 * (num_weights + 512)
    quantise(module, precision)
    # Scales of whole rows weigh more in a narrow layer than in the table's wide one.
    row_scales = 8 * 5 * 512 / num_weights
    bits = 8 * (weight_bytes(module) - 2 * 512) / num_weights
    assert PRECISIONS[precision].bits - 0.01 <= bits <= PRECISIONS[precision].bits + row_scales


@pytest.mark.parametrize("precision", BASE_PRECISIONS)
def test_the_input_gradient_is_that_of_the_weights_in_use(precision: str) -> None:
    module = model(64, 128)
    quantise(module, precision)
    inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    upstream = torch.randn(4, 128, generator=torch.Generator().manual_seed(2))
    module(inputs).backward(upstream)
    expected = upstream.double() @ seen_weight(module[0], 64)
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad.double(), expected, rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("precision", [name for name in ON_CPU if name not in BASE_PRECISIONS])
def test_what_is_not_trainable_gives_no_gradient(precision: str) -> None:
    module = model(64, 128)
    quantise(module, precision)
    inputs = torch.ones(4, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|derivative .* not implemented"):
        module(inputs).sum().backward()


@pytest.mark.parametrize("precision", BASE_PRECISIONS)
def test_inference_in_between_does_not_take_the_gradient_away(precision: str) -> None:
    module = model(64, 128, dtype=torch.bfloat16)
    quantise(module, precision)
    inputs = torch.ones(4, 64, dtype=torch.bfloat16)
    before = module.train()(inputs)
    with torch.no_grad():
        module.eval()(inputs)
    after = module.train()(inputs.clone().requires_grad_())
    after.sum().backward()
    assert torch.equal(before, after)


def test_no_change_keeps_the_module_as_it_is() -> None:
    module = model(32, 16)
    quantise(module, "no_change")
    assert type(module[0]) is nn.Linear


@pytest.mark.parametrize("precision", ["int8-quanto", "int8-torchao", "nf4-bnb"])
def test_part_by_part_gives_the_same_as_the_whole(precision: str) -> None:
    whole, parts = (nn.ModuleList([model(64, 128), model(64, 128)]) for _ in range(2))
    quantise(whole, precision)
    for part in parts:
        quantise(part, precision)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one(torch.eye(64)), other(torch.eye(64)))


def test_leaves_rows_that_a_kernel_reads_past(caplog: pytest.LogCaptureFixture) -> None:
    module = model(32, 40, 16)
    with caplog.at_level(logging.WARNING):
        quantise(module, "int8-quanto")
    assert [type(child) for child in module] == [QLinear, nn.Linear]
    assert caplog.messages == ["left as loaded, inputs not a multiple of 16: 1"]


def test_leaves_outputs_that_a_kernel_refuses(caplog: pytest.LogCaptureFixture) -> None:
    module = model(64, 72, 32).to(torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        quantise(module, "int4-quanto")
    assert type(module[0]) is nn.Linear
    assert caplog.messages == ["left as loaded, inputs not a multiple of 32 or outputs not of 16: 0, 1"]


def test_names_a_few_of_many_layers_that_are_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        quantise(model(*[40] * 9), "int8-quanto")
    assert caplog.messages == ["left as loaded, inputs not a multiple of 16: 0, 1, 2, 3, 4 and 3 more"]


def test_the_table_says_what_may_be_trained_on() -> None:
    assert set(ENCODER_PRECISIONS) - set(BASE_PRECISIONS) == {"int8dq-torchao", "fp8-torchao", "int4-torchao"}


@pytest.mark.parametrize("name", [*REFUSED, *PRECISIONS, "int7", "int8"])
@pytest.mark.parametrize("is_trained_on", [True, False])
def test_what_is_refused_names_something_that_works(name: str, is_trained_on: bool) -> None:
    allowed = BASE_PRECISIONS if is_trained_on else ENCODER_PRECISIONS
    problem = refusal(name, is_trained_on=is_trained_on)
    assert (problem is None) == (name in allowed)
    if problem is not None:
        assert name in problem
        assert any(f"use {works!r}" in problem for works in allowed) or "use one of no_change, int8-quanto" in problem


def test_refuses_what_the_device_cannot_do() -> None:
    with pytest.raises(ValueError, match="'fp8-torchao' needs a cuda device, not 'cpu'; use 'fp8wo-torchao'"):
        check_precision("fp8-torchao")
    check_precision("fp8-torchao", device="cuda:0")


def test_refuses_to_train_on_quantised_activations() -> None:
    with pytest.raises(ValueError, match=r"'int8dq-torchao' cannot be trained on: .* use 'int8-torchao'"):
        check_precision("int8dq-torchao", is_trained_on=True)
