"""Gradients through the experts against finite differences: the trap of spec 2.2."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reverie_hidream.moe import moe_forward
from reverie_hidream.transformer import load_transformer, predict_velocity

MakeBatch = Callable[..., Any]


def test_the_gradient_of_an_expert_s_input_equals_finite_differences(tiny_checkpoint: Path) -> None:
    moe = load_transformer(tiny_checkpoint, dtype=torch.float64).double_stream_blocks[0].block.ff_i
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 6, 64, generator=generator, dtype=torch.float64).requires_grad_(True)

    assert torch.autograd.gradcheck(lambda hidden: moe_forward(moe, hidden), (inputs,), fast_mode=True)


def test_the_gradient_of_the_latents_through_all_blocks_equals_finite_differences(
    tiny_checkpoint: Path, make_batch: MakeBatch
) -> None:
    transformer = load_transformer(tiny_checkpoint, dtype=torch.float64)
    # An odd non-square size, so that the folded padding is differentiated too.
    batch = make_batch(4, 6, batch_size=1)
    direction = batch.latents / batch.latents.norm()
    timesteps = torch.tensor([400.0])

    def value(distance: float) -> torch.Tensor:
        velocity = predict_velocity(transformer, batch.noise + distance * direction, timesteps, batch.text)
        return velocity.square().sum()

    latents = batch.noise.clone().requires_grad_(True)
    loss = predict_velocity(transformer, latents, timesteps, batch.text).square().sum()
    slope = (torch.autograd.grad(loss, latents)[0] * direction).sum()

    # The step is far above float32's, in which rotary embeddings are computed (spec 1.5).
    step = 1e-3
    difference = (value(step) - value(-step)) / (2 * step)
    assert abs(difference - slope) / abs(slope) < 1e-3


def test_cutting_the_gradient_at_the_experts_would_be_seen(tiny_checkpoint: Path) -> None:
    """diffusers' inference path computes the routed experts under no_grad; its gradient is far from ours."""
    moe = load_transformer(tiny_checkpoint, dtype=torch.float64).double_stream_blocks[0].block.ff_i
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 64, 64, generator=generator, dtype=torch.float64).requires_grad_(True)

    ours = torch.autograd.grad(moe_forward(moe, inputs).square().sum(), inputs)[0]
    cut = torch.autograd.grad(moe.eval()(inputs).square().sum(), inputs)[0]

    assert (ours - cut).norm() / ours.norm() > 0.05
