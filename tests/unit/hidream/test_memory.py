"""Recomputing some blocks and keeping frozen ones on the host: the same numbers, and the copies that are promised."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reverie_hidream.adapters.config import LokrConfig
from reverie_hidream.adapters.lokr import LokrAdapter, attach_lokr
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.host_blocks import HostBlocks, weights_at_hand
from reverie_hidream.memory import blocks_of, host_blocks, set_checkpointing_interval, spread
from reverie_hidream.precisions import BASE_PRECISIONS
from reverie_hidream.quantise import weight_bytes
from reverie_hidream.transformer import enable_gradient_checkpointing, load_transformer, predict_velocity
from torch import nn

NUM_BLOCKS = 6  # of the tiny checkpoint: 2 double-stream, 4 single-stream


def make_inputs() -> tuple[torch.Tensor, torch.Tensor, TextConditioning]:
    """Latents, a timestep and embeddings for the tiny checkpoint."""
    generator = torch.Generator().manual_seed(0)
    conditioning = TextConditioning(
        t5=torch.randn(1, 8, 112, generator=generator),
        llama=torch.randn(4, 1, 8, 96, generator=generator),
        pooled=torch.randn(1, 80, generator=generator),
    )
    return torch.randn(1, 16, 8, 8, generator=generator), torch.tensor([500.0]), conditioning


def adapted(transformer: Any) -> LokrAdapter:
    """A LoKr that changes something, the same every time."""
    adapter = attach_lokr(transformer, LokrConfig(factor=4), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return adapter


def step(transformer: Any, adapter: LokrAdapter) -> list[torch.Tensor]:
    """The prediction and the gradients of one step."""
    for parameter in adapter.parameters():
        parameter.grad = None
    prediction = predict_velocity(transformer, *make_inputs())
    prediction.square().mean().backward()
    return [prediction.detach(), *(_gradient(parameter) for parameter in adapter.parameters())]


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad.clone()


def all_equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Whether tensors are the same to the last bit."""
    return len(some) == len(others) and all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def count_runs(transformer: Any) -> list[int]:
    """How often each block has run, kept up to date."""
    runs = [0] * NUM_BLOCKS

    def counter(index: int) -> Callable[..., None]:
        def count(*_: object) -> None:
            runs[index] += 1

        return count

    for index, block in enumerate(blocks_of(transformer)):
        # Each block's forward asks its adaLN for the modulation once.
        block.get_submodule("block.adaLN_modulation").register_forward_pre_hook(counter(index))
    return runs


@pytest.mark.parametrize(
    ("interval", "expected"),
    [(1, [2, 2, 2, 2, 2, 2]), (2, [2, 1, 2, 1, 2, 1]), (3, [2, 1, 1, 2, 1, 1]), (100, [2, 1, 1, 1, 1, 1])],
)
def test_only_every_nth_block_is_recomputed(tiny_checkpoint: Path, interval: int, expected: list[int]) -> None:
    transformer = load_transformer(tiny_checkpoint, dtype=torch.float32)
    adapter = adapted(transformer)
    enable_gradient_checkpointing(transformer, False)
    plain = step(transformer, adapter)
    enable_gradient_checkpointing(transformer, True)
    set_checkpointing_interval(transformer, interval)
    runs = count_runs(transformer)
    assert all_equal(step(transformer, adapter), plain)
    assert runs == expected


def test_more_recomputation_keeps_less(tiny_checkpoint: Path) -> None:
    transformer = load_transformer(tiny_checkpoint, dtype=torch.float32)
    adapted(transformer)
    enable_gradient_checkpointing(transformer, True)

    def kept(interval: int) -> int:
        set_checkpointing_interval(transformer, interval)
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            predict_velocity(transformer, *make_inputs())
        return sum(sizes)

    assert kept(1) < kept(2) < kept(3) < kept(100)


def test_refuses_an_interval_of_nothing() -> None:
    with pytest.raises(ValueError, match="interval 0 is below 1"):
        set_checkpointing_interval(nn.Linear(1, 1), 0)


@pytest.mark.parametrize(
    ("num_chosen", "num_blocks", "expected"),
    [(0, 6, ()), (1, 6, (5,)), (2, 6, (2, 5)), (4, 6, (0, 2, 3, 5)), (6, 6, (0, 1, 2, 3, 4, 5)), (3, 48, (15, 31, 47))],
)
def test_spreads_what_waits(num_chosen: int, num_blocks: int, expected: tuple[int, ...]) -> None:
    assert spread(num_chosen, num_blocks) == expected


def test_refuses_more_blocks_than_there_are(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="7 offloaded blocks, but the model has 6; lower num_offloaded_blocks"):
        load_transformer(tiny_checkpoint, num_offloaded_blocks=7)


@pytest.mark.parametrize("interval", [None, 1, 2])
@pytest.mark.parametrize("precision", BASE_PRECISIONS)
def test_offloaded_blocks_give_the_same_bits(tiny_checkpoint: Path, precision: str, interval: int | None) -> None:
    results = []
    for num_offloaded in (0, 4):
        transformer = load_transformer(
            tiny_checkpoint, dtype=torch.bfloat16, precision=precision, num_offloaded_blocks=num_offloaded
        )
        adapter = adapted(transformer)
        enable_gradient_checkpointing(transformer, interval is not None)
        set_checkpointing_interval(transformer, interval or 1)
        # Twice: what the first step left in the slots must not be taken for something else.
        results.append([*step(transformer, adapter), *step(transformer, adapter)])
    assert all_equal(*results)


def test_without_offloading_a_slot_would_be_wrong(tiny_checkpoint: Path) -> None:
    """The blocks really compute with what is in the slots: spoiling the host's copies changes the prediction."""
    transformer = load_transformer(tiny_checkpoint, dtype=torch.float32, num_offloaded_blocks=2)
    adapter = adapted(transformer)
    before = step(transformer, adapter)
    waiting = blocks_of(transformer)[spread(2, NUM_BLOCKS)[0]]
    for parameter in waiting.parameters():
        parameter.data.zero_()
    assert not torch.equal(before[0], step(transformer, adapter)[0])


def test_copies_ahead_and_never_back(tiny_checkpoint: Path) -> None:
    transformer = load_transformer(tiny_checkpoint, dtype=torch.float32, num_offloaded_blocks=4)
    adapter = adapted(transformer)
    enable_gradient_checkpointing(transformer, True)
    host = _host(transformer)
    buffers = [parameter.detach().clone() for parameter in transformer.parameters()]
    # Attaching the adapter has left the last two in the slots.
    before = host.num_copies
    step(transformer, adapter)
    # Forward 4; backward finds the last two in the slots and copies the two before them.
    assert host.num_copies - before == 4 + 2
    step(transformer, adapter)
    # Forward finds the first two where backward left them.
    assert host.num_copies - before == 4 + 2 + 2 + 2
    assert all_equal([parameter.detach() for parameter in transformer.parameters()], buffers)


def test_fetches_the_next_block_before_it_is_needed(tiny_checkpoint: Path) -> None:
    transformer = load_transformer(tiny_checkpoint, dtype=torch.float32, num_offloaded_blocks=NUM_BLOCKS)
    host = _host(transformer)
    copies: list[int] = []
    for block in blocks_of(transformer):
        block.get_submodule("block.adaLN_modulation").register_forward_pre_hook(
            lambda *_: copies.append(host.num_copies)
        )
    with torch.no_grad():
        predict_velocity(transformer, *make_inputs())
    # When block k computes, k + 1 is on its way; there is nothing after the last.
    assert copies == [2, 3, 4, 5, 6, 6]


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto", "fp8wo-torchao"])
def test_the_device_holds_two_blocks_of_those_that_wait(tiny_checkpoint: Path, precision: str) -> None:
    plain = load_transformer(tiny_checkpoint, precision=precision)
    sizes = [weight_bytes(block) for block in blocks_of(plain)]
    transformer = load_transformer(tiny_checkpoint, precision=precision, num_offloaded_blocks=4)
    host = _host(transformer)
    with torch.no_grad():
        predict_velocity(transformer, *make_inputs())
    waiting = [sizes[index] for index in host.indices]
    num_tensors = sum(1 for block in blocks_of(plain) for _ in block.parameters())
    assert sum(waiting) <= host.host_bytes <= sum(waiting) + 2 * 256 * num_tensors
    assert 2 * max(waiting) <= host.device_bytes <= 2 * (max(waiting) + 2 * 256 * num_tensors)


def test_weights_that_wait_can_be_read(tiny_checkpoint: Path) -> None:
    plain = load_transformer(tiny_checkpoint, dtype=torch.float32).state_dict()
    transformer = load_transformer(tiny_checkpoint, dtype=torch.float32, num_offloaded_blocks=4)
    with torch.no_grad():
        predict_velocity(transformer, *make_inputs())
    assert all(torch.equal(tensor, plain[name]) for name, tensor in transformer.state_dict().items())


def test_trainable_parameters_stay_where_they_are() -> None:
    layer = nn.Linear(4, 4)
    layer.bias.requires_grad_(True)
    layer.weight.requires_grad_(False)
    bias, weight = layer.bias.data_ptr(), layer.weight.data_ptr()
    HostBlocks(torch.device("cpu")).add(0, layer)
    assert layer.bias.data_ptr() == bias
    assert layer.weight.data_ptr() != weight


def _host(transformer: nn.Module) -> HostBlocks:
    host = host_blocks(transformer)
    assert host is not None
    return host


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_weights_at_hand_are_those_in_the_slot(tiny_checkpoint: Path, precision: str) -> None:
    transformer = load_transformer(tiny_checkpoint, precision=precision, num_offloaded_blocks=4)
    host = _host(transformer)
    waiting = blocks_of(transformer)[host.indices[0]]
    linear = waiting.get_submodule("block.attn1.to_q")
    before = host.num_copies
    assert weights_at_hand(linear) == torch.device("cpu")
    assert host.num_copies == before + 1
    assert weights_at_hand(waiting.get_submodule("block.attn1.to_k")) == torch.device("cpu")
    assert host.num_copies == before + 1


@pytest.mark.parametrize("changes", [{"init_lokr_norm": 1e-3}, {"dora_wd": True}], ids=str)
def test_an_adapter_starts_from_weights_that_wait(tiny_checkpoint: Path, changes: dict[str, Any]) -> None:
    states = []
    for num_offloaded in (0, 4):
        transformer = load_transformer(tiny_checkpoint, dtype=torch.float32, num_offloaded_blocks=num_offloaded)
        adapter = attach_lokr(transformer, LokrConfig(factor=4, **changes), seed=1)
        predictions = step(transformer, adapter)
        states.append([*adapter.raw_state().values(), *predictions])
    assert all_equal(*states)
