"""The mixture of experts against diffusers' training path."""

from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from reverie_hidream import moe as own
from reverie_hidream.quantise import quantise
from torch import nn


def make_moe(dtype: torch.dtype = torch.float64, width: int = 32) -> MOEFeedForwardSwiGLU:
    torch.manual_seed(0)
    module = MOEFeedForwardSwiGLU(dim=width, hidden_dim=64, num_routed_experts=4, num_activated_experts=2)
    return module.to(dtype).train()


def gradients(module: nn.Module, output: torch.Tensor, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    names = [name for name, _ in module.named_parameters()]
    found = torch.autograd.grad((output * weight).sum(), [inputs, *module.parameters()])
    return dict(zip(["input", *names], found, strict=True))


def test_equals_diffusers_with_all_gradients() -> None:
    module = make_moe()
    inputs = torch.randn(2, 33, 32, dtype=torch.float64, requires_grad=True)

    ours, theirs = own.moe_forward(module, inputs), module(inputs)

    assert torch.allclose(ours, theirs, rtol=0, atol=1e-13)
    expected = gradients(module, theirs, inputs)
    found = gradients(module, ours, inputs)
    assert found.keys() == expected.keys()
    assert max((found[name] - expected[name]).abs().max().item() for name in expected) < 1e-12


def test_every_expert_and_the_gate_have_gradients_in_eval_mode_too() -> None:
    module = make_moe().eval()
    inputs = torch.randn(1, 64, 32, dtype=torch.float64, requires_grad=True)

    found = gradients(module, own.moe_forward(module, inputs), inputs)

    assert all(gradient.abs().sum() > 0 for gradient in found.values())


def test_an_expert_without_tokens_has_a_gradient_of_zeros() -> None:
    module = make_moe()
    with torch.no_grad():
        # Scores follow the gate's rows: opposite rows of a constant input keep experts 2 and 3 out.
        module.gate.weight.copy_(torch.tensor([[1.0], [0.9], [-1.0], [-0.9]]).expand(4, 32))
    inputs = torch.ones(1, 5, 32, dtype=torch.float64, requires_grad=True)

    found = gradients(module, own.moe_forward(module, inputs), inputs)

    assert found["experts.0.w1.weight"].abs().sum() > 0
    assert found["experts.2.w1.weight"].abs().sum() == 0


def test_grouped_gemm_equals_one_gemm_for_each_expert() -> None:
    module = make_moe(torch.float32).requires_grad_(False)
    inputs = torch.randn(2, 33, 32, requires_grad=True)
    expected = own.moe_forward(module, inputs)
    expected_gradient = torch.autograd.grad(expected.square().sum(), inputs)[0]
    names = list(module.state_dict())

    own.stack_experts(module)
    grouped = own.moe_forward(module, inputs)
    gradient = torch.autograd.grad(grouped.square().sum(), inputs)[0]

    assert own._stacked_weights(module.experts, inputs) is not None
    assert list(module.state_dict()) == names
    assert torch.allclose(grouped, expected, atol=1e-6)
    assert torch.allclose(gradient, expected_gradient, atol=1e-5)


def test_stacks_are_not_used_once_an_expert_has_another_weight_or_forward() -> None:
    module = make_moe(torch.float32).requires_grad_(False)
    inputs = torch.randn(1, 3, 32)
    own.stack_experts(module)
    first: Any = module.experts[0].w1

    first.forward = lambda hidden: hidden
    assert own._stacked_weights(module.experts, inputs) is None
    del first.forward
    assert own._stacked_weights(module.experts, inputs) is not None
    first.weight = nn.Parameter(first.weight.clone(), requires_grad=False)
    assert own._stacked_weights(module.experts, inputs) is None


def test_stacks_are_not_used_in_another_dtype() -> None:
    module = make_moe(torch.float32).requires_grad_(False)
    own.stack_experts(module)

    assert own._stacked_weights(module.experts, torch.randn(1, 3, 32).bfloat16()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_experts_pass_gradients_to_the_input(dtype: torch.dtype) -> None:
    plain, module = make_moe(dtype), make_moe(dtype)
    quantise(module, "int8-quanto")
    inputs = torch.randn(1, 33, 32).to(dtype).requires_grad_(True)

    output = own.moe_forward(module, inputs)
    gradient = torch.autograd.grad(output.float().square().sum(), inputs)[0]
    expected = own.moe_forward(plain, inputs)

    assert output.dtype == dtype
    assert gradient.isfinite().all()
    assert (output - expected).norm() / expected.norm() < 0.05
