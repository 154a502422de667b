"""Every optimiser of the table: what it computes, what it keeps, and that a resumed one goes on exactly."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from reverie_common.optimizer_catalogue import CATALOGUE, REFUSED
from reverie_hidream.optimizers import (
    OPTIMIZERS,
    OptimizerOptionError,
    UnknownOptimizerError,
    averaged_weights,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    parameter_dtype,
    set_learning_rate,
)
from torch import nn

# Large enough for a state in 8 bits, a small matrix, a vector, a scalar as LoKr's.
SHAPES = [(96, 96), (4, 3), (5,), ()]
RELATIVES_OF_ADAMW = ["adamw", "torch-adamw", "bnb-adamw", "bnb-adamw-paged"]
RELATIVES_OF_LION = ["optimi-lion", "bnb-lion", "bnb-lion-paged"]


def parameters(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradient_of(step: int, index: int, shape: Sequence[int]) -> torch.Tensor:
    return torch.randn(list(shape), generator=torch.Generator().manual_seed(100 * step + index))


def train(optimizer: torch.optim.Optimizer, tensors: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for index, tensor in enumerate(tensors):
            tensor.grad = gradient_of(step, index, tensor.shape).to(tensor.dtype)
        set_learning_rate(optimizer, 1e-2 / (step + 1))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def are_equal(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimiser_continues_to_the_last_bit(name: str) -> None:
    straight = parameters(parameter_dtype(name))
    optimizer = build_optimizer(name, straight, learning_rate=1e-2, weight_decay=0.1, seed=5)
    train(optimizer, straight, range(4))
    saved_state = optimizer_tensors(optimizer)
    saved_parameters = copies(straight)
    train(optimizer, straight, range(4, 12))

    resumed = [nn.Parameter(tensor.clone()) for tensor in saved_parameters]
    fresh = build_optimizer(name, resumed, learning_rate=1e-2, weight_decay=0.1, seed=5)
    load_optimizer_tensors(fresh, saved_state)
    train(fresh, resumed, range(4, 12))

    assert are_equal(straight, resumed)
    assert not are_equal(straight, saved_parameters)
    ended, expected = optimizer_tensors(fresh), optimizer_tensors(optimizer)
    assert ended.keys() == expected.keys()
    assert all(torch.equal(ended[key], expected[key]) for key in expected)
