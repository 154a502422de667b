"""Frozen blocks that wait in host memory and are copied to the device ahead of use; nothing is ever copied back.

Each block's weights lie in one pinned host buffer. The device has two slots; block k of those on the host always uses
slot k mod 2, so that what autograd has kept of a block's weights in the forward pass, views into the slot, is right
again when the block is copied in for the backward pass. While one block computes, the next is copied on a stream of its
own. On a CPU the same happens without streams: it saves nothing there and is for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

Place = tuple[torch.Tensor, Callable[[torch.Tensor], None]]
"""A plain tensor, and how to put another in its stead."""

_ALIGNMENT = 256
"""Bytes; what CUDA's allocator gives, and more than any kernel asks for."""

_NUM_SLOTS = 2
_WAITING = "_reverie_host_block"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Region:
    """One plain tensor of a block's weights: where it lies in a buffer, and how to put another in its stead."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    num_bytes: int
    put: Callable[[torch.Tensor], None]

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        flat = buffer[self.offset : self.offset + self.num_bytes].view(self.dtype)
        # `.data` counts its changes apart: autograd would take a new copy into the slot for a change of a kept weight.
        return flat.as_strided(self.shape, self.stride).data


class _HostBlock:
    """The frozen weights of one block in one host buffer."""

    def __init__(self, block: nn.Module, *, pinned: bool) -> None:
        tensors = [
            each for parameter in block.parameters() if not parameter.requires_grad for each in plain_tensors(parameter)
        ]
        self.regions: list[_Region] = []
        end = 0
        for tensor, put in tensors:
            self.regions.append(_region(tensor, put, end))
            end += -(-self.regions[-1].num_bytes // _ALIGNMENT) * _ALIGNMENT
        self.buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        for region, (tensor, _) in zip(self.regions, tensors, strict=True):
            region.view(self.buffer).copy_(tensor)
        self.point_at(self.buffer)

    def point_at(self, buffer: torch.Tensor) -> None:
        for region in self.regions:
            region.put(region.view(buffer))


class _Slot:
    """Device memory for one block at a time."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.content: int | None = None
        """Whose weights are here, or on their way."""
        self.bound: int | None = None
        """Whose parameters are views of this slot."""
        self.arrived: Any = None


def weights_at_hand(module: nn.Module) -> torch.device:
    """Bring the weights of a module to the device where its block waits on the host; returns where they are.

    For whoever reads weights, or makes something that belongs beside them, outside of the forward pass. They stay until
    other blocks need their place.
    """
    waiting: tuple[HostBlocks, int] | None = getattr(module, _WAITING, None)
    if waiting is not None:
        host, position = waiting
        host.bring(position)
    return next(module.parameters()).device


class HostBlocks:
    """Some blocks of a transformer, by index. For one thread, and one pass through the model at a time."""

    def __init__(self, device: torch.device) -> None:
        """Begin with none."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._blocks: list[_HostBlock] = []
        self._positions: dict[int, int] = {}
        self._slots: list[_Slot] = []
        self.num_copies = 0
        """Blocks copied to the device so far."""

    def __contains__(self, index: int) -> bool:
        return index in self._positions

    @property
    def indices(self) -> tuple[int, ...]:
        """The blocks that wait here."""
        return tuple(self._positions)

    @property
    def host_bytes(self) -> int:
        """Host memory in use."""
        return sum(block.buffer.nbytes for block in self._blocks)

    @property
    def device_bytes(self) -> int:
        """Device memory in use: the slots."""
        return sum(slot.buffer.nbytes for slot in self._slots)

    def add(self, index: int, block: nn.Module) -> None:
        """Move the frozen weights of a block to the host, from wherever they are. Blocks come in the order of use."""
        for module in block.modules():
            # A plain attribute: it is no part of the model.
            object.__setattr__(module, _WAITING, (self, len(self._blocks)))
        self._positions[index] = len(self._blocks)
        self._blocks.append(_HostBlock(block, pinned=self._device.type == "cuda"))
        self._slots.clear()

    def bring(self, position: int) -> None:
        """Have the weights of the block at a position on the device; the next use of its slot takes them away again."""
        self._load(position, ahead=0)

    def loading(self, index: int, block: Callable[..., Any]) -> Callable[..., Any]:
        """`block`, with its weights on the device whenever it runs: at once, and when it is recomputed."""
        is_recomputed = False

        def run(*arguments: Any) -> Any:
            nonlocal is_recomputed
            self._load(self._positions[index], ahead=-1 if is_recomputed else 1)
            is_recomputed = True
            return block(*arguments)

        return run

    def before_backward(self, index: int, outputs: Any) -> Any:
        """`outputs` of a block, which will have its weights on the device before their gradient goes into it."""

        def load(_: torch.Tensor) -> None:
            self._load(self._positions[index], ahead=-1)

        for output in _tensors(outputs):
            if output.requires_grad:
                output.register_hook(load)
        return outputs

    def _load(self, position: int, *, ahead: int) -> None:
        self._fetch(position)
        slot = self._slot(position)
        if slot.arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.arrived)
        if slot.bound != position:
            self._blocks[position].point_at(slot.buffer)
            slot.bound = position
        if 0 <= position + ahead < len(self._blocks):
            self._fetch(position + ahead)

    def _fetch(self, position: int) -> None:
        """Start to copy a block into its slot, unless it is there."""
        slot = self._slot(position)
        if slot.content == position:
            return
        if slot.bound is not None:
            self._blocks[slot.bound].point_at(self._blocks[slot.bound].buffer)
            slot.bound = None
        slot.content = position
        self.num_copies += 1
        source = self._blocks[position].buffer
        with self._copying():
            slot.buffer[: source.nbytes].copy_(source, non_blocking=True)
            if self._stream is not None:
                slot.arrived = self._stream.record_event()

    def _copying(self) -> Any:
        if self._stream is None:
            return nullcontext()
        # What was in the slot may still be in use by what is queued so far.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)

    def _slot(self, position: int) -> _Slot:
        if not self._slots:
            size = max(block.buffer.nbytes for block in self._blocks)
            self._slots = [_Slot(size, self._device) for _ in range(min(_NUM_SLOTS, len(self._blocks)))]
        return self._slots[position % len(self._slots)]


def _tensors(outputs: Any) -> Iterator[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        yield outputs
    elif isinstance(outputs, tuple):
        for output in outputs:
            yield from _tensors(output)


def _region(tensor: torch.Tensor, put: Callable[[torch.Tensor], None], offset: int) -> _Region:
    # Strides are kept, also those of a transposed tensor: kernels may count on them.
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return _Region(
        offset=offset,
        dtype=tensor.dtype,
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        num_bytes=extent * tensor.element_size(),
        put=put,
    )


def plain_tensors(tensor: torch.Tensor) -> Iterator[Place]:
    """The plain tensors that a weight of any precision is made of, and how to replace each.

    Of bitsandbytes' weights, the 4-bit values; their scales, 3 % of the memory, are used where they are.
    """
    names = _inner_names(tensor)
    for name in names:
        inner = getattr(tensor, name)
        if _inner_names(inner):
            yield from plain_tensors(inner)
        else:
            yield inner, partial(setattr, tensor, name)
    if not names:
        yield tensor, partial(_set_data, tensor)


def _inner_names(tensor: torch.Tensor) -> list[str]:
    flatten: Callable[[], tuple[list[str], Mapping[str, Any]]] | None = getattr(tensor, "__tensor_flatten__", None)
    return [] if flatten is None else flatten()[0]


def _set_data(parameter: torch.Tensor, data: torch.Tensor) -> None:
    parameter.data = data
