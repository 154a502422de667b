"""Branches that are no product of small factors: IA3's scales, OFT's and BOFT's rotations, and a full matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from reverie_hidream.adapters.branch import LinearCall
from reverie_hidream.adapters.factored import FactoredBranch


class Ia3Branch(FactoredBranch):
    """IA3: each output (or input) of the weight is scaled by 1 + a trained number; the bias is left alone."""

    factor_names = ("weight",)

    def __init__(
        self, name: str, factors: Mapping[str, torch.Tensor], *, on_input: bool = False, **settings: Any
    ) -> None:
        """See FactoredBranch; `on_input` scales the inputs."""
        super().__init__(name, factors, **settings)
        self.on_input = on_input

    def change_of(self, call: LinearCall) -> torch.Tensor:
        """See Branch."""
        scale = self.factor("weight", call.hidden.dtype) * self.total_strength
        return call.again(call.hidden * scale) if self.on_input else call.product * scale

    def weight_change(self, weight: torch.Tensor, /) -> torch.Tensor:
        """See Branch."""
        scale = self.factor("weight", self.own_dtype) * self.total_strength
        return weight.to(self.own_dtype) * (scale if self.on_input else scale[:, None])

    def exported(self) -> dict[str, torch.Tensor]:
        """See Branch."""
        return {**super().exported(), "on_input": torch.tensor(int(self.on_input))}


class FullMatrixBranch(FactoredBranch):
    """LyCORIS' `full`: a dense change of the weight and of the bias."""

    factor_names = ("diff", "diff_b")

    def change_of(self, call: LinearCall) -> torch.Tensor:
        """See Branch."""
        dtype = call.hidden.dtype
        bias = self.factor("diff_b", dtype) if "diff_b" in self.factors else None
        return functional.linear(call.hidden, self.factor("diff", dtype), bias) * self.total_strength

    def weight_change(self, _: torch.Tensor, /) -> torch.Tensor:
        """See Branch."""
        return self.factors["diff"] * self.total_strength

    def bias_change(self) -> torch.Tensor | None:
        """See Branch."""
        return self.factors["diff_b"] * self.total_strength if "diff_b" in self.factors else None


class RotationBranch(FactoredBranch):
    """OFT and BOFT: the weight's rows are rotated in blocks, in one stage or in butterfly stages.

    `oft_blocks` is (n, b, b), or (m, n, b, b) for m butterfly stages; n blocks of b rows each. R = (I + Q) (I - Q)^-1
    with Q = blocks - blocks^T is orthogonal. A strength s takes each stage to I + s (R - I), as LyCORIS does.
    """

    factor_names = ("oft_blocks", "rescale")

    def __init__(self, name: str, factors: Mapping[str, torch.Tensor], *, constraint: float, **settings: Any) -> None:
        """See FactoredBranch.

        Args:
            constraint: limit of the norm of Q relative to the Linear's output width; 0 is no limit.
        """
        super().__init__(name, factors, **settings)
        self.constraint = constraint

    def change_of(self, call: LinearCall) -> torch.Tensor:
        """See Branch."""
        product = call.product
        # A rotation in bfloat16 would not be one.
        wide = product.to(torch.promote_types(product.dtype, torch.float32))
        return (self._turned(wide) - wide).to(product.dtype)

    def weight_change(self, weight: torch.Tensor, /) -> torch.Tensor:
        """See Branch."""
        columns = weight.t().to(self.own_dtype)
        return (self._turned(columns) - columns).t()

    def exported(self) -> dict[str, torch.Tensor]:
        """See Branch: OFT's files keep the constraint under the name of alpha."""
        return {**super().exported(), "alpha": torch.tensor(self.constraint, dtype=torch.float32)}

    def _turned(self, values: torch.Tensor) -> torch.Tensor:
        """The values (..., out) rotated along their last axis."""
        rotations = self._rotations(values.dtype)
        turned = _oft(values, rotations) if rotations.ndim == 3 else _butterfly(values, rotations)
        if "rescale" not in self.factors:
            return turned
        rescale = self.factors["rescale"].to(values.dtype).flatten()
        return turned * (1 + (rescale - 1) * self.total_strength)

    def _rotations(self, dtype: torch.dtype) -> torch.Tensor:
        blocks = self.factors["oft_blocks"].to(dtype)
        skew = blocks - blocks.transpose(-1, -2)
        if self.constraint > 0:
            limit = self.constraint * self.out_features
            skew = skew * (limit / (skew.norm() + 1e-8)).clamp(max=1.0)
        identity = torch.eye(blocks.shape[-1], dtype=dtype, device=blocks.device)
        # (I + Q) (I - Q)^-1; the two factors commute, so the solve may stand on the left.
        rotations: torch.Tensor = torch.linalg.solve(identity - skew, identity + skew)
        turned: torch.Tensor = identity + (rotations - identity) * self.total_strength
        return turned


def _oft(values: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    blocks, size, _ = rotations.shape
    grouped = values.unflatten(-1, (blocks, size))
    return torch.einsum("knm,...kn->...km", rotations, grouped).flatten(-2)


def _butterfly(values: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Stage i mixes rows that are 2**i half blocks apart."""
    size = rotations.shape[-1]
    for stage, rotation in enumerate(rotations):
        stride = 2**stage * size // 2
        shuffled = values.unflatten(-1, (-1, 2, stride)).transpose(-2, -1).flatten(-3).unflatten(-1, (-1, size))
        mixed = torch.einsum("bij,...bj->...bi", rotation, shuffled).flatten(-2)
        values = mixed.unflatten(-1, (-1, stride, 2)).transpose(-2, -1).flatten(-3)
    return values
