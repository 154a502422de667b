"""Gradient clipping."""

import math

import pytest
import torch
from reverie_hidream.optimizers import clip_gradients, gradient_absmax
from torch import nn


def with_gradients() -> list[nn.Parameter]:
    tensors = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]
    tensors[0].grad, tensors[1].grad = torch.tensor([3.0, -0.5]), torch.tensor([4.0])
    return tensors


def test_clipping_by_value_clamps_each_element_and_reports_the_norm_before() -> None:
    tensors = with_gradients()

    norm = clip_gradients(tensors, "value", 1.0)

    assert norm.item() == pytest.approx(math.sqrt(25.25))
    assert [tensor.grad.tolist() for tensor in tensors[:2] if tensor.grad is not None] == [[1.0, -0.5], [1.0]]


def test_clipping_by_norm_scales_the_whole_gradient() -> None:
    tensors = with_gradients()

    norm = clip_gradients(tensors, "norm", 1.0)

    assert norm.item() == pytest.approx(math.sqrt(25.25))
    scaled = torch.cat([tensor.grad for tensor in tensors[:2] if tensor.grad is not None])
    assert scaled.tolist() == pytest.approx([value / math.sqrt(25.25) for value in (3.0, -0.5, 4.0)], rel=1e-5)


@pytest.mark.parametrize(("method", "limit"), [("value", 0.0), ("norm", 0.0), ("norm", 100.0), ("value", 100.0)])
def test_a_gradient_within_the_limit_stays(method: str, limit: float) -> None:
    tensors = with_gradients()

    clip_gradients(tensors, method, limit)

    assert torch.equal(tensors[0].grad, torch.tensor([3.0, -0.5]))  # type: ignore[arg-type]  # it has a gradient


def test_no_gradients_have_norm_zero() -> None:
    assert clip_gradients([nn.Parameter(torch.zeros(2))], "norm", 1.0).item() == 0.0


@pytest.mark.parametrize(("method", "limit"), [("length", 1.0), ("norm", -1.0), ("norm", math.nan)])
def test_refuses_an_unknown_method_or_limit(method: str, limit: float) -> None:
    with pytest.raises(ValueError, match="gradient clip"):
        clip_gradients(with_gradients(), method, limit)


def test_the_largest_element_is_that_of_all_gradients() -> None:
    assert gradient_absmax(with_gradients()).item() == 4.0
    assert gradient_absmax([nn.Parameter(torch.zeros(2))]).item() == 0.0
