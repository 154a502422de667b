"""DoRA: the changed weight's rows get their length from a trained number, and only their direction from the change.

The changed weight is magnitude * (W + dW) / ||W + dW||, row by row. The product with it needs no dense weight, but the
lengths do: W and dW are written out once in each forward, and again where a block is recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from reverie_hidream.adapters.branch import Branch, LinearCall


class DoraBranch(Branch):
    """Another branch with DoRA around it."""

    def __init__(self, inner: Branch, magnitude: torch.Tensor, *, is_length_fixed: bool, key: str) -> None:
        """Take over a branch that changes the weight linearly.

        Args:
            magnitude: (out_features, 1) or (out_features,).
            is_length_fixed: no gradient flows through the lengths, as in PEFT; LyCORIS lets it.
            key: name of the magnitude in files.
        """
        super().__init__(
            inner.name, out_features=inner.out_features, in_features=inner.in_features, multiplier=inner.multiplier
        )
        # LyCORIS lets a multiplier scale the whole change, not the change inside the length.
        inner.multiplier = 1.0
        self.inner = inner
        self.drops_rows, self.drops_change = inner.drops_rows, inner.drops_change
        self.magnitude = magnitude
        self._is_length_fixed = is_length_fixed
        self._frozen_stretch: torch.Tensor | None = None
        self._key = key

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See Branch."""
        yield from self.inner.named_tensors()
        yield self._key, self.magnitude

    def move(self, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """See Branch."""
        self.inner.move(device=device, dtype=dtype)
        self.magnitude = self.magnitude.to(device=device, dtype=dtype)
        self._frozen_stretch = None

    def change_of(self, call: LinearCall) -> torch.Tensor:
        """See Branch."""
        dtype = call.hidden.dtype
        stretch = self._stretch_for(call).to(dtype)
        self.inner.dropout = self.dropout
        change = self.inner.change_of(call)
        return ((stretch - 1) * call.product + stretch * change) * self.total_strength

    def weight_change(self, weight: torch.Tensor, /) -> torch.Tensor:
        """See Branch."""
        wide = weight.to(self.magnitude.dtype)
        changed = wide + self.inner.weight_change(wide)
        return (changed * self._stretch(weight)[:, None] - wide) * self.total_strength

    def exported(self) -> dict[str, torch.Tensor]:
        """See Branch."""
        return {**self.inner.exported(), self._key: self.magnitude.detach()}

    def _stretch_for(self, call: LinearCall) -> torch.Tensor:
        if self.magnitude.requires_grad:
            return self._stretch(call.weight())
        # A loaded adapter does not change any more.
        if self._frozen_stretch is None:
            self._frozen_stretch = self._stretch(call.weight())
        return self._frozen_stretch

    def _stretch(self, weight: torch.Tensor) -> torch.Tensor:
        """What each row of W + dW is multiplied with. (out_features,)"""
        wide = weight.to(torch.promote_types(self.magnitude.dtype, torch.float32))
        lengths: torch.Tensor = torch.linalg.vector_norm(wide + self.inner.weight_change(wide), dim=1)
        if self._is_length_fixed:
            lengths = lengths.detach()
        return self.magnitude.flatten() / (lengths + torch.finfo(lengths.dtype).eps)


def row_lengths(weight: torch.Tensor) -> torch.Tensor:
    """The start of a magnitude: the lengths of the frozen weight's rows. (out_features, 1) float32 or float64"""
    wide = torch.promote_types(weight.dtype, torch.float32)
    lengths: torch.Tensor = torch.linalg.vector_norm(weight.detach().to(wide), dim=1, keepdim=True)
    return lengths
