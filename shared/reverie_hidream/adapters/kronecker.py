"""LoKr: the change of a weight is kron(W1, W2) (spec 4.3, 4.4).

kron(W1, W2) is never built: with x seen as a matrix X (i1, i2), kron(W1, W2) x is W1 X W2^T. o1 * o2 is the layer's
output width, i1 * i2 its input width; W1 (o1, i1), W2 (o2, i2); a factorised part is A (o, r) @ B (r, i).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from reverie_hidream.adapters.branch import Branch, LinearCall

FACTOR_NAMES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


class LokrBranch(Branch):
    """The factors of one adapted Linear."""

    def __init__(
        self,
        name: str,
        factors: Mapping[str, torch.Tensor],
        *,
        alpha: float,
        scalar: torch.nn.Parameter | None = None,
        multiplier: float = 1.0,
    ) -> None:
        """Take the factors as they are, without copying.

        Args:
            name: `lycoris_<dotted path with _>`.
            factors: some of `FACTOR_NAMES`: each part either whole or as its two halves.
            alpha: scale is alpha / rank, or 1 where both parts are whole; 0 means rank.
            scalar: trainable factor; None for none.
        """
        self.factors = dict(factors)
        self.scalar = scalar
        rank = _rank(self.factors)
        self.alpha = alpha
        self.scale = 1.0 if rank is None else (alpha or rank) / rank
        out_features, in_features, self._w1_first = _plan(self.factors)
        super().__init__(name, out_features=out_features, in_features=in_features, multiplier=multiplier)

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The trained tensors as they are, the scalar apart."""
        for name in FACTOR_NAMES:
            if name in self.factors:
                yield name, self.factors[name]
        if self.scalar is not None:
            yield "scalar", self.scalar

    def move(self, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """See Branch."""
        self.factors = {name: tensor.to(device=device, dtype=dtype) for name, tensor in self.factors.items()}

    def change_of(self, call: LinearCall) -> torch.Tensor:
        """See Branch."""
        return self.change(call.hidden)

    def change(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the Linear's output, computed in the dtype of `hidden`. (..., out_features)"""
        w1, w2 = self._parts(hidden.dtype)
        grouped = hidden.reshape(-1, w1.shape[1], w2.shape[1])
        # The cheaper order; the results are the same.
        if self._w1_first:
            changed = torch.matmul(torch.matmul(w1, grouped), w2.t())
        else:
            changed = torch.matmul(w1, torch.matmul(grouped, w2.t()))
        return changed.view(*hidden.shape[:-1], self.out_features)

    def weight_change(self, _: torch.Tensor, /) -> torch.Tensor:
        """See Branch."""
        return torch.kron(*self._parts(next(iter(self.factors.values())).dtype))

    def exported(self) -> dict[str, torch.Tensor]:
        """See Branch: the scalar is multiplied into W1, or into its first half (spec 4.6)."""
        tensors = {name: tensor.detach() for name, tensor in self.factors.items()}
        if self.scalar is not None:
            first = "lokr_w1" if "lokr_w1" in tensors else "lokr_w1_a"
            tensors[first] = tensors[first] * self.scalar.detach()
        return {"alpha": torch.tensor(self.alpha, dtype=torch.float32), **tensors}

    def _parts(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        w1, w2 = self._part("lokr_w1"), self._part("lokr_w2")
        # Every scalar factor goes into the small W1, not over the activations.
        strength = self.scale * self.total_strength
        if self.scalar is not None:
            w1 = w1 * (self.scalar * strength if strength != 1.0 else self.scalar)
        elif strength != 1.0:
            w1 = w1 * strength
        return w1.to(dtype), w2.to(dtype)

    def _part(self, name: str) -> torch.Tensor:
        if name in self.factors:
            return self.factors[name]
        return self.factors[f"{name}_a"] @ self.factors[f"{name}_b"]


def _rank(factors: Mapping[str, torch.Tensor]) -> int | None:
    for name in ("lokr_w1_b", "lokr_w2_b"):
        if name in factors:
            return factors[name].shape[0]
    return None


def _plan(factors: Mapping[str, torch.Tensor]) -> tuple[int, int, bool]:
    """Output width, input width, and whether applying W1 first costs less than W2 first."""
    (o1, i1), (o2, i2) = (_part_shape(factors, name) for name in ("lokr_w1", "lokr_w2"))
    w1_first_cost = o1 * i1 * i2 + o1 * i2 * o2
    w2_first_cost = i1 * i2 * o2 + o1 * i1 * o2
    return o1 * o2, i1 * i2, w1_first_cost < w2_first_cost


def _part_shape(factors: Mapping[str, torch.Tensor], name: str) -> tuple[int, int]:
    if name in factors:
        rows, columns = factors[name].shape
        return rows, columns
    return factors[f"{name}_a"].shape[0], factors[f"{name}_b"].shape[1]
