"""Low-rank branches: LoRA and LoCon, LoHa, DyLoRA, GLoRA.

r rank, out and in the Linear's widths. Names of factors are those of LyCORIS' files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from reverie_hidream.adapters.branch import LinearCall
from reverie_hidream.adapters.factored import FactoredBranch

DOWN, UP = "lora_down.weight", "lora_up.weight"


class LowRankBranch(FactoredBranch):
    """LoRA on a Linear, which LyCORIS calls LoCon: the change is scale * up @ down; up (out, r), down (r, in)."""

    factor_names = (UP, DOWN)
    scaled_factors = (UP,)

    def __init__(
        self,
        name: str,
        factors: Mapping[str, torch.Tensor],
        *,
        start: tuple[torch.Tensor, torch.Tensor] | None = None,
        drops_inputs: bool = False,
        **settings: Any,
    ) -> None:
        """See FactoredBranch.

        Args:
            start: (up, down) whose product is taken off again, so that factors that start from the weight change
                nothing at first.
            drops_inputs: dropout is on the inputs, as in PEFT, and not on the change, as in LyCORIS.
        """
        super().__init__(name, factors, rank=factors[DOWN].shape[0], **settings)
        self.start = start
        self.drops_change = not drops_inputs
        self.drops_rows = False

    def change_of(self, call: LinearCall) -> torch.Tensor:
        """See Branch."""
        dtype = call.hidden.dtype
        up, down = self.used_factors(dtype)
        hidden = call.hidden
        if not self.drops_change and self.dropout is not None:
            hidden = self.dropout.elements(hidden)
        inner = functional.linear(hidden, down)
        if self.dropout is not None and (mask := self.dropout.rank_mask(self.rank, inner)) is not None:
            inner = inner * mask
        change = functional.linear(inner, up * self.gain(dtype))
        if self.start is None:
            return change
        first_up, first_down = (tensor.to(dtype) for tensor in self.start)
        taken_off = functional.linear(functional.linear(call.hidden, first_down), first_up)
        return change - taken_off * (self.scale * self.total_strength)

    def weight_change(self, _: torch.Tensor, /) -> torch.Tensor:
        """See Branch."""
        up, down = self.used_factors(self.own_dtype)
        change = (up * self.gain(self.own_dtype)) @ down
        if self.start is None:
            return change
        return change - (self.start[0] @ self.start[1]).to(change) * (self.scale * self.total_strength)

    def used_factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Up and down as they are computed with."""
        return self.factor(UP, dtype), self.factor(DOWN, dtype)


class DyloraBranch(LowRankBranch):
    """DyLoRA: a LoRA that is good at every smaller rank too.

    Each micro-batch uses the first n blocks of rows, n drawn evenly, and trains the last of them. Its scale is alpha
    over the rank in use, so that the whole is the LoRA that the file says; LyCORIS' own forward divides by the number
    of blocks, which its file does not repeat.
    """

    def __init__(self, name: str, factors: Mapping[str, torch.Tensor], *, block_size: int, **settings: Any) -> None:
        """See LowRankBranch; `block_size` divides the rank."""
        super().__init__(name, factors, **settings)
        self.block_size = block_size

    def used_factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """See LowRankBranch."""
        up, down = super().used_factors(dtype)
        if self.dropout is None or not self.dropout.clock.is_training:
            return up, down
        begin = self.dropout.choice(self.rank // self.block_size) * self.block_size
        end = begin + self.block_size
        ranks = torch.arange(self.rank, device=up.device)
        is_used, is_trained = ranks < end, (ranks >= begin) & (ranks < end)
        up = torch.where(is_trained, up, up.detach()) * is_used.to(dtype) * (self.rank / end)
        return up, torch.where(is_trained[:, None], down, down.detach())


class LohaBranch(FactoredBranch):
    """LoHa: the change is scale * (w1_a @ w1_b) * (w2_a @ w2_b), element by element; a (out, r), b (r, in)."""

    factor_names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    scaled_factors = ("hada_w1_a",)

    def __init__(self, name: str, factors: Mapping[str, torch.Tensor], **settings: Any) -> None:
        """See FactoredBranch."""
        super().__init__(name, factors, rank=factors["hada_w1_b"].shape[0], **settings)

    def change_of(self, call: LinearCall) -> torch.Tensor:
        """See Branch."""
        return functional.linear(call.hidden, self._weight(call.hidden.dtype))

    def weight_change(self, _: torch.Tensor, /) -> torch.Tensor:
        """See Branch."""
        return self._weight(self.own_dtype)

    def _weight(self, dtype: torch.dtype) -> torch.Tensor:
        w1a, w1b, w2a, w2b = (self.factor(name, dtype) for name in self.factor_names)
        return ((w1a * self.gain(dtype)) @ w1b) * (w2a @ w2b)


class GloraBranch(FactoredBranch):
    """GLoRA: the change is scale * (W a1 a2 + b1 b2); a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in)."""

    factor_names = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
    scaled_factors = ("a2.weight", "b2.weight")

    def __init__(self, name: str, factors: Mapping[str, torch.Tensor], **settings: Any) -> None:
        """See FactoredBranch."""
        super().__init__(name, factors, rank=factors["a2.weight"].shape[0], **settings)
        self.drops_rows = False

    def change_of(self, call: LinearCall) -> torch.Tensor:
        """See Branch."""
        dtype = call.hidden.dtype
        a1, a2, b1, b2 = (self.factor(name, dtype) for name in self.factor_names)
        through_weight, beside = functional.linear(call.hidden, a2), functional.linear(call.hidden, b2)
        if self.dropout is not None and (mask := self.dropout.rank_mask(self.rank, beside)) is not None:
            through_weight, beside = through_weight * mask, beside * mask
        gain = self.gain(dtype)
        return call.again(functional.linear(through_weight, a1 * gain)) + functional.linear(beside, b1 * gain)

    def weight_change(self, weight: torch.Tensor, /) -> torch.Tensor:
        """See Branch."""
        a1, a2, b1, b2 = (self.factor(name, self.own_dtype) for name in self.factor_names)
        return (weight.to(self.own_dtype) @ a1 @ a2 + b1 @ b2) * self.gain(self.own_dtype)
