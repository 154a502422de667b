"""Gradient clipping (spec 5.6)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from reverie_common.optimizer_catalogue import CLIP_METHODS


def clip_gradients(parameters: Iterable[torch.nn.Parameter], method: str, limit: float) -> torch.Tensor:
    """Clip gradients in place, and return their norm before that.

    Args:
        method: `value` clamps each element to +-limit, `norm` scales the whole gradient down to the limit.
        limit: 0 clips nothing.

    Returns:
        0-d float32: the norm of the whole gradient. Not yet read by the host.

    Raises:
        ValueError: unknown method or negative limit.
    """
    if method not in CLIP_METHODS:
        raise ValueError(f"gradient clip method {method!r} is unknown; use one of {', '.join(CLIP_METHODS)}")
    if not limit >= 0:
        raise ValueError(f"gradient clip limit {limit} is below 0; 0 switches clipping off")
    gradients = _gradients(parameters)
    if not gradients:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit and method == "value":
        clamp_gradients(gradients, limit)
    elif limit:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def clamp_gradients(gradients: list[torch.Tensor], limit: float) -> None:
    """Clamp each element to +-limit, in place."""
    torch._foreach_clamp_max_(gradients, limit)
    torch._foreach_clamp_min_(gradients, -limit)


def gradient_absmax(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """The largest absolute value of all gradients: 0-d, not yet read by the host; 0 without gradients."""
    gradients = _gradients(parameters)
    if not gradients:
        return torch.zeros(())
    return torch.stack([largest.float() for largest in torch._foreach_norm(gradients, math.inf)]).max()


def _gradients(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
