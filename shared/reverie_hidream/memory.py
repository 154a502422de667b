"""What saves device memory at the cost of time: recomputing only some blocks, and keeping frozen blocks on the host.

Both are settings of a transformer, read by `block_runner`, through which every block runs. Blocks are counted over the
double-stream blocks and then the single-stream ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from reverie_hidream.host_blocks import HostBlocks

_ATTRIBUTE = "_reverie_memory"


@dataclass(kw_only=True, slots=True)
class _Memory:
    checkpointing_interval: int = 1
    host: HostBlocks | None = None


def set_checkpointing_interval(transformer: nn.Module, interval: int) -> None:
    """With gradient checkpointing, recompute only blocks whose index is a multiple; the gradients are the same.

    Raises:
        ValueError: the interval is below 1.
    """
    if interval < 1:
        raise ValueError(f"gradient checkpointing interval {interval} is below 1")
    _memory(transformer).checkpointing_interval = interval


def checkpointing_interval(transformer: nn.Module) -> int:
    """What `set_checkpointing_interval` has set; 1 is every block."""
    return _memory(transformer).checkpointing_interval


def spread(num_chosen: int, num_blocks: int) -> tuple[int, ...]:
    """Indices of the blocks that wait on the host: evenly spread, so that others compute while one is copied.

    Raises:
        ValueError: more are chosen than there are.
    """
    if not 0 <= num_chosen <= num_blocks:
        raise ValueError(f"{num_chosen} offloaded blocks, but the model has {num_blocks}; lower num_offloaded_blocks")
    return tuple((place + 1) * num_blocks // num_chosen - 1 for place in range(num_chosen))


def keep_on_host(transformer: nn.Module, host: HostBlocks | None) -> None:
    """Run blocks whose weights wait on the host; None for none. See `HostBlocks`."""
    _memory(transformer).host = host


def host_blocks(transformer: nn.Module) -> HostBlocks | None:
    """The blocks that wait on the host."""
    return _memory(transformer).host


def blocks_of(transformer: Any) -> list[nn.Module]:
    """The blocks, in the order in which they run."""
    return [*transformer.double_stream_blocks, *transformer.single_stream_blocks]


def block_runner(transformer: Any) -> Callable[..., Any]:
    """A function that runs one block: `run(index, block, *arguments)` is `block(*arguments)`.

    For one forward pass: it recomputes the block in the backward pass where that is asked for, and has its weights on
    the device when they are needed.
    """
    memory = _memory(transformer)
    recompute = transformer.gradient_checkpointing and torch.is_grad_enabled()

    def run(index: int, block: Callable[..., Any], *arguments: Any) -> Any:
        module: Any = arguments[0]
        if isinstance(module, FSDPModule):
            # FSDP gathers the weights around a call of the module itself; `shard` has made it call what it is given.
            sharded: Any = module
            return sharded(partial(run_whole, index, block), *arguments[1:])
        return run_whole(index, block, *arguments)

    def run_whole(index: int, block: Callable[..., Any], *arguments: Any) -> Any:
        host = memory.host if memory.host is not None and index in memory.host else None
        body = block if host is None else host.loading(index, block)
        if recompute and index % memory.checkpointing_interval == 0:
            # No dropout in the blocks, so no random state to keep.
            outputs = checkpoint(body, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            outputs = body(*arguments)
        return outputs if host is None else host.before_backward(index, outputs)

    return run


def _memory(transformer: nn.Module) -> _Memory:
    memory: _Memory | None = getattr(transformer, _ATTRIBUTE, None)
    if memory is None:
        memory = _Memory()
        # A plain attribute: it is no part of the model.
        object.__setattr__(transformer, _ATTRIBUTE, memory)
    return memory
