"""A frozen model that can wait in host memory: its weights are copied there once, and back whenever needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from reverie_hidream.host_blocks import Place, plain_tensors
from reverie_hidream.moe import stack_experts, unstack_experts

Copy = Callable[[torch.Tensor], torch.Tensor]


class HostCopy:
    """Moves a frozen model between its device and the host, tensor by tensor and bit by bit, whatever its precision.

    Quantised weights are not converted, as `Module.to` would do with some: what comes back is what went. The host's
    copy is kept, so that parking again copies nothing. On a CPU nothing moves.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        *,
        copy_to_host: Copy | None = None,
        copy_to_device: Copy | None = None,
    ) -> None:
        """Take a model that is on the device.

        Args:
            copy_to_host: how a tensor gets to the host; by default into pinned memory.
            copy_to_device: how it gets back.
        """
        self._module = module
        self._device = device
        self._copy_to_host = copy_to_host or _pinned
        self._copy_to_device = copy_to_device or (lambda tensor: tensor.to(device, non_blocking=True))
        self._host: list[torch.Tensor] | None = None
        self._were_stacked: list[nn.Module] = []

    def to_host(self) -> None:
        """Point the weights at the host's copy, which gives the device's memory back."""
        self._were_stacked = [module for module in self._module.modules() if unstack_experts(module)]
        if self._host is None:
            self._host = [self._copy_to_host(tensor) for tensor, _ in self._places()]
        self._point_at(self._host)
        if self._device.type == "cuda":
            # Freed for this process alone otherwise.
            torch.cuda.empty_cache()

    def to_device(self) -> None:
        """Copy the weights to the device.

        Raises:
            torch.OutOfMemoryError: the device is full; the weights are on the host still.
        """
        if self._host is None:
            return
        self._point_at([self._copy_to_device(tensor) for tensor in self._host])
        for moe in self._were_stacked:
            stack_experts(moe)

    def _point_at(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor, (_, put) in zip(tensors, self._places(), strict=True):
            put(tensor)

    def _places(self) -> Iterator[Place]:
        for tensor in (*self._module.parameters(), *self._module.buffers()):
            yield from plain_tensors(tensor)


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)
