"""`init_lokr_norm`: a LoKr that starts as a small perturbation with the statistics of the frozen weights (spec 4.4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from reverie_hidream.adapters.branch import Branch, dense_weight
from reverie_hidream.adapters.config import AdapterConfigError
from reverie_hidream.adapters.dora import DoraBranch
from reverie_hidream.adapters.kronecker import LokrBranch


@torch.no_grad()
def start_near_weights(
    branches: Mapping[str, Branch], linears: Mapping[str, nn.Module], *, size: float, seed: int
) -> None:
    """Set every W1 to ones and every W2 to noise that follows its Linear's weight, times `size`.

    The weight of a quantised Linear is dequantised first. With a scalar, which starts at 0, the change stays 0.

    Raises:
        AdapterConfigError: a W1 or W2 is factorised: there is no W2 to set. Nothing is changed.
    """
    lokrs = {name: _lokr_of(branch) for name, branch in branches.items()}
    factorised = [name for name, lokr in lokrs.items() if not {"lokr_w1", "lokr_w2"} <= lokr.factors.keys()]
    if factorised:
        raise AdapterConfigError(
            f"init_lokr_norm needs whole factors, but those of {len(factorised)} modules are split, the first is "
            f"{factorised[0]}; set full_matrix, raise linear_dim, or leave init_lokr_norm out"
        )
    generator = torch.Generator().manual_seed(seed)
    for name, lokr in lokrs.items():
        weight = dense_weight(linears[name], linears[name].forward)
        w2 = lokr.factors["lokr_w2"]
        noise = torch.randn(w2.shape, generator=generator, dtype=torch.float32).to(w2.device)
        lokr.factors["lokr_w1"].fill_(1.0)
        w2.copy_(_like(noise, weight.float()) * size)


def _like(noise: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The noise with the weight's norm, then its standard deviation, then its mean."""
    noise = noise * (weight.norm() / noise.norm())
    noise = noise * (weight.std() / noise.std())
    return noise - noise.mean() + weight.mean()


def _lokr_of(branch: Branch) -> LokrBranch:
    inner = branch.inner if isinstance(branch, DoraBranch) else branch
    if not isinstance(inner, LokrBranch):
        raise AdapterConfigError(f"init_lokr_norm is for LoKr; {branch.name} is another algorithm")
    return inner
