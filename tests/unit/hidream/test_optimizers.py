"""Optimisers, clipping and schedules."""

import math
from typing import Any

import pytest
import torch
from reverie_hidream.optimizers import (
    OPTIMIZERS,
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from torch import nn


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in [(4, 3), (5,), ()]]


def train(optimizer: torch.optim.Optimizer, tensors: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for index, tensor in enumerate(tensors):
            generator = torch.Generator().manual_seed(100 * step + index)
            tensor.grad = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        set_learning_rate(optimizer, 1e-2 / (step + 1))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_optimiser_continues_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    straight = parameters(dtype)
    optimizer = build_optimizer(name, straight, learning_rate=1e-2, weight_decay=0.1)
    train(optimizer, straight, range(3))
    saved_state = optimizer_tensors(optimizer)
    saved_parameters = [tensor.detach().clone() for tensor in straight]
    train(optimizer, straight, range(3, 6))

    resumed = [nn.Parameter(tensor.clone()) for tensor in saved_parameters]
    fresh = build_optimizer(name, resumed, learning_rate=1e-2, weight_decay=0.1)
    load_optimizer_tensors(fresh, saved_state)
    train(fresh, resumed, range(3, 6))

    assert all(torch.equal(one, other) for one, other in zip(straight, resumed, strict=True))
    assert optimizer_tensors(fresh).keys() == optimizer_tensors(optimizer).keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_complete_named_and_detached(name: str) -> None:
    tensors = parameters()
    optimizer = build_optimizer(name, tensors, learning_rate=1e-2)
    assert optimizer_tensors(optimizer) == {}
    train(optimizer, tensors, range(1))

    state = optimizer_tensors(optimizer)
    before = {key: tensor.clone() for key, tensor in state.items()}
    train(optimizer, tensors, range(1, 2))

    assert {key.split(".")[0] for key in state} == {"00000", "00001", "00002"}
    assert "00000.exp_avg" in state
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_adamw_equals_torch_s_default_implementation() -> None:
    ours, theirs = parameters(), parameters()
    train(build_optimizer("adamw", ours, learning_rate=1e-2), ours, range(4))
    train(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.01, foreach=False, fused=False), theirs, range(4))

    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(ours, theirs, strict=True))


def test_lion_steps_by_the_sign_of_the_interpolated_gradient() -> None:
    tensor = nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    optimizer = build_optimizer("optimi-lion", [tensor], learning_rate=0.1)
    tensor.grad = torch.tensor([0.5, -3.0, 0.0])

    optimizer.step()

    assert tensor.tolist() == pytest.approx([0.9, 1.1, 1.0])
    assert optimizer.state[tensor]["exp_avg"].tolist() == pytest.approx([0.005, -0.03, 0.0])


def test_lion_compensates_rounding_for_16_bit_weights_only() -> None:
    for dtype, compensated in ((torch.float32, False), (torch.bfloat16, True)):
        tensors = parameters(dtype)
        optimizer = build_optimizer("optimi-lion", tensors, learning_rate=1e-2)
        train(optimizer, tensors, range(1))

        assert ("00000.kahan_comp" in optimizer_tensors(optimizer)) is compensated


def test_weight_decay_defaults_to_the_optimiser_s_own() -> None:
    adamw = build_optimizer("adamw", parameters(), learning_rate=1e-2)
    lion = build_optimizer("optimi-lion", parameters(), learning_rate=1e-2)

    assert adamw.param_groups[0]["weight_decay"] == 0.01
    assert lion.param_groups[0]["weight_decay"] == 0.0


def test_refuses_an_unknown_optimiser() -> None:
    with pytest.raises(ValueError, match=r"'sgd' is unknown; use one of adamw, optimi-lion"):
        build_optimizer("sgd", parameters(), learning_rate=1e-2)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"00007.exp_avg": torch.zeros(4, 3)}, "none of the 3 parameters"),
        ({"exp_avg": torch.zeros(4, 3)}, "none of the 3 parameters"),
        ({"00000.exp_avg": torch.zeros(2, 2)}, r"shape \(2, 2\), its parameter \(4, 3\)"),
    ],
)
def test_refuses_the_state_of_other_parameters(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_optimizer_tensors(build_optimizer("adamw", parameters(), learning_rate=1e-2), state)


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


def test_constant_schedule_warms_up_linearly_and_stays() -> None:
    rates = [learning_rate_at("constant_with_warmup", step, learning_rate=8.0, warmup_steps=4) for step in range(1, 8)]

    assert rates == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0, 8.0]


def test_cosine_falls_to_zero_after_its_own_warm_up() -> None:
    rates = [learning_rate_at("cosine", step, learning_rate=1.0, warmup_steps=2, max_steps=10) for step in range(1, 12)]

    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert 0.0 < rates[9] < 0.05
    assert rates[10] == 0.0


def test_schedules_without_warm_up_start_at_the_full_rate() -> None:
    assert learning_rate_at("constant_with_warmup", 1, learning_rate=3.0) == 3.0
    assert learning_rate_at("cosine", 1, learning_rate=3.0, max_steps=5) == 3.0


@pytest.mark.parametrize(("schedule", "step"), [("sine", 1), ("cosine", 0)])
def test_refuses_an_unknown_schedule_or_step(schedule: str, step: int) -> None:
    with pytest.raises(ValueError, match=r"unknown|before the first"):
        learning_rate_at(schedule, step, learning_rate=1.0)
