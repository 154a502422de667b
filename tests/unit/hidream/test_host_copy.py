"""Parking a model: its memory is given back, and it computes the same afterwards."""

from pathlib import Path

import pytest
import torch
from reverie_hidream.host_blocks import plain_tensors
from reverie_hidream.host_copy import HostCopy
from reverie_hidream.moe import stack_experts, unstack_experts
from reverie_hidream.precisions import PRECISIONS
from reverie_hidream.text import load_text_encoder
from reverie_hidream.transformer import load_transformer
from torch import nn

CPU = torch.device("cpu")


class Copies:
    """Stands in for a second device: copies are new memory, and are counted."""

    def __init__(self) -> None:
        self.num_copies = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_copies += 1
        return tensor.clone()


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "fp8-torchao"])
def test_comes_back_with_the_same_embeddings(tiny_checkpoint: Path, precision: str) -> None:
    encoder = load_text_encoder(tiny_checkpoint, "t5", precision=precision)
    before = encoder.encode(["a red fox"])[0].tensor
    to_host, to_device = Copies(), Copies()
    parked = HostCopy(encoder.module, CPU, copy_to_host=to_host, copy_to_device=to_device)
    addresses = _addresses(encoder.module)
    parked.to_host()
    assert not addresses & _addresses(encoder.module)
    on_host = _addresses(encoder.module)
    parked.to_device()
    assert not on_host & _addresses(encoder.module)
    assert torch.equal(encoder.encode(["a red fox"])[0].tensor, before)
    parked.to_host()
    assert on_host == _addresses(encoder.module)
    assert to_device.num_copies == to_host.num_copies > 0


def _addresses(module: nn.Module) -> set[int]:
    return {plain.data_ptr() for parameter in module.parameters() for plain, _ in plain_tensors(parameter)}


def test_a_full_device_leaves_it_on_the_host() -> None:
    module = nn.Linear(4, 4).requires_grad_(False)
    calls = 0

    def full(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("full")
        return tensor.clone()

    parked = HostCopy(module, CPU, copy_to_host=torch.clone, copy_to_device=full)
    parked.to_host()
    on_host = _addresses(module)
    with pytest.raises(torch.OutOfMemoryError):
        parked.to_device()
    assert _addresses(module) == on_host
    parked.to_device()
    assert not _addresses(module) & on_host


def test_stacked_experts_are_unstacked_on_the_host_and_stacked_again(tiny_checkpoint: Path) -> None:
    transformer = load_transformer(tiny_checkpoint)
    feed_forward = transformer.get_submodule("single_stream_blocks.0.block.ff_i")
    stack_experts(feed_forward)
    parked = HostCopy(transformer, CPU, copy_to_host=torch.clone, copy_to_device=torch.clone)
    parked.to_host()
    assert not unstack_experts(feed_forward)
    parked.to_device()
    assert unstack_experts(feed_forward)


def test_on_a_cpu_nothing_moves() -> None:
    module = nn.Linear(4, 4)
    addresses = _addresses(module)
    parked = HostCopy(module, CPU)
    parked.to_host()
    parked.to_device()
    assert _addresses(module) == addresses
