"""Branches whose tensors are held by name: what the algorithms other than LoKr have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from reverie_hidream.adapters.branch import Branch


class FactoredBranch(Branch):
    """A branch over named factors, with LyCORIS' optional scalar."""

    scaled_factors: tuple[str, ...] = ()
    """Factors that the scalar is multiplied into in the file."""
    factor_names: tuple[str, ...] = ()
    """All factors, in the order of the state."""

    def __init__(
        self,
        name: str,
        factors: Mapping[str, torch.Tensor],
        *,
        size: tuple[int, int],
        alpha: float | None = None,
        rank: int = 1,
        scalar: torch.nn.Parameter | None = None,
        multiplier: float = 1.0,
    ) -> None:
        """Take the factors as they are, without copying.

        Args:
            factors: some of `factor_names`.
            size: (out_features, in_features) of the Linear.
            alpha: scale is alpha / rank; 0 means rank; None where the algorithm has no scale.
        """
        super().__init__(name, out_features=size[0], in_features=size[1], multiplier=multiplier)
        self.factors = dict(factors)
        self.scalar = scalar
        self.rank = rank
        self.alpha = alpha
        self.scale = 1.0 if alpha is None else (alpha or rank) / rank

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See Branch."""
        for name in self.factor_names:
            if name in self.factors:
                yield name, self.factors[name]
        if self.scalar is not None:
            yield "scalar", self.scalar

    def move(self, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """See Branch."""
        self.factors = {name: tensor.to(device=device, dtype=dtype) for name, tensor in self.factors.items()}

    def exported(self) -> dict[str, torch.Tensor]:
        """See Branch."""
        tensors = {name: tensor.detach() for name, tensor in self.factors.items()}
        if self.scalar is not None:
            for name in self.scaled_factors:
                tensors[name] = tensors[name] * self.scalar.detach()
        if self.alpha is not None:
            tensors["alpha"] = torch.tensor(float(self.alpha), dtype=torch.float32)
        return tensors

    def factor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One factor as it is computed with."""
        return self.factors[name].to(dtype)

    def gain(self, dtype: torch.dtype) -> torch.Tensor | float:
        """Scale, scalar and strength together."""
        gain = self.scale * self.total_strength
        return gain if self.scalar is None else (self.scalar * gain).to(dtype)

    @property
    def own_dtype(self) -> torch.dtype:
        """Dtype of the factors."""
        return next(iter(self.factors.values())).dtype
