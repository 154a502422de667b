"""Dropouts of an adapter, as functions of (seed, step, micro-batch) and of nothing else.

No generator has a state that a resume could lose, and a block that is recomputed in the backward pass finds the masks
of its forward pass again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(kw_only=True, slots=True)
class AdapterClock:
    """Where training is; shared by all modules of an adapter."""

    seed: int
    step: int = 0
    micro_batch: int = 0
    is_training: bool = True
    """Whether there is any dropout at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchDropout:
    """What one module leaves out of one micro-batch."""

    clock: AdapterClock
    index: int
    """Of the module in its adapter."""
    element: float = 0.0
    """Probability for each element of a tensor."""
    rank: float = 0.0
    """Probability for each row or rank."""
    module: float = 0.0
    """Probability for the module as a whole."""

    @property
    def is_active(self) -> bool:
        """Whether anything may be left out now."""
        return self.clock.is_training and (self.element > 0 or self.rank > 0 or self.module > 0)

    def leaves_out_module(self) -> bool:
        """Whether the whole module is left out of this micro-batch; decided without the device."""
        return self.clock.is_training and self._number("module") / 2**63 < self.module

    def rank_mask(self, size: int, like: torch.Tensor) -> torch.Tensor | None:
        """1 for each row or rank that stays, 0 for each that is left out; None where all stay. (size,)

        What stays is not scaled up, as in LyCORIS.
        """
        if not (self.clock.is_training and self.rank > 0):
            return None
        return (self._uniform("rank", (size,), like.device) >= self.rank).to(like.dtype)

    def choice(self, num_choices: int) -> int:
        """One of 0 .. num_choices - 1, decided without the device."""
        return self._number("choice") % num_choices

    def elements(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with elements left out and the others scaled up, so that its mean stays."""
        if not (self.clock.is_training and self.element > 0):
            return tensor
        kept = self._uniform("element", tuple(tensor.shape), tensor.device) >= self.element
        return tensor * (kept.to(tensor.dtype) / (1 - self.element))

    def _uniform(self, what: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        generator = torch.Generator(device=device).manual_seed(self._number(what))
        return torch.rand(shape, generator=generator, device=device)

    def _number(self, what: str) -> int:
        """A number in 0 .. 2**63 - 1 that stands for this place."""
        clock = self.clock
        place = f"reverie/adapter-dropout/{clock.seed}/{clock.step}/{clock.micro_batch}/{self.index}/{what}"
        return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "little") >> 1
