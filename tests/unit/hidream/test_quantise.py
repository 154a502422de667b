"""int8 weights: frozen, close, and away from shapes that the kernel cannot take."""

import logging
from itertools import pairwise

import pytest
import torch
from optimum.quanto import QLinear
from reverie_hidream.quantise import PRECISIONS, check_precision, quantise
from torch import nn


def model(*widths: int) -> nn.Sequential:
    """Linears of the widths, one after another."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_freezes_every_parameter(precision: str) -> None:
    module = model(32, 64, 16)
    quantise(module, precision)
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_backward_reaches_the_input_and_no_weight(precision: str) -> None:
    module = model(32, 64, 16)
    quantise(module, precision)
    inputs = torch.ones(4, 32, requires_grad=True)
    module(inputs).sum().backward()
    assert inputs.grad is not None
    assert all(parameter.grad is None for parameter in module.parameters())


def test_no_change_keeps_the_module_as_it_is() -> None:
    module = model(32, 16)
    quantise(module, "no_change")
    assert type(module[0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_is_close_to_the_original(dtype: torch.dtype) -> None:
    module = model(64, 128, 32).to(dtype)
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = module(inputs).float()
    quantise(module, "int8-quanto")
    error = (module(inputs).float() - expected).norm() / expected.norm()
    # Half a step of 1/127 of a row's largest weight, twice, plus bfloat16's own 2^-9.
    assert 0 < error < 0.02


def test_int8_holds_one_byte_for_each_weight() -> None:
    module = model(64, 128)
    quantise(module, "int8-quanto")
    (linear,) = module
    assert isinstance(linear, QLinear)
    assert linear.weight._data.dtype == torch.int8


def test_int8_leaves_rows_that_the_kernel_reads_past(caplog: pytest.LogCaptureFixture) -> None:
    module = model(32, 40, 16)
    with caplog.at_level(logging.WARNING):
        quantise(module, "int8-quanto")
    assert [type(child) for child in module] == [QLinear, nn.Linear]
    assert caplog.messages == ["left as loaded, inputs not a multiple of 16: 1"]


def test_refuses_an_unknown_precision() -> None:
    with pytest.raises(ValueError, match="'fp8-quanto' is not known; use one of no_change, int8-quanto"):
        check_precision("fp8-quanto")
