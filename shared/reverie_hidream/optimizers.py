"""Optimisers, gradient clipping and learning-rate schedules of a job (spec 5.4 to 5.6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from optimi import Lion

OPTIMIZERS = ("adamw", "optimi-lion")
DEFAULT_WEIGHT_DECAY: Mapping[str, float] = {"adamw": 0.01, "optimi-lion": 0.0}
CLIP_METHODS = ("value", "norm")
SCHEDULES = ("constant_with_warmup", "cosine")


def build_optimizer(
    name: str, parameters: Iterable[torch.nn.Parameter], *, learning_rate: float, weight_decay: float | None = None
) -> torch.optim.Optimizer:
    """An optimiser over an adapter's parameters.

    Args:
        name: `adamw` (betas 0.9 0.999, eps 1e-8) or `optimi-lion` (betas 0.9 0.99, Kahan summation for 16-bit weights).
        learning_rate: of the first step; the loop sets it with `set_learning_rate`.
        weight_decay: None is the optimiser's own, see `DEFAULT_WEIGHT_DECAY`.

    Raises:
        ValueError: unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} is unknown; use one of {', '.join(OPTIMIZERS)}")
    decay = DEFAULT_WEIGHT_DECAY[name] if weight_decay is None else weight_decay
    return _BUILDERS[name](list(parameters), learning_rate, decay)


def _build_adamw(
    parameters: Sequence[torch.nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    # One kernel over all parameters; the looped default takes longer than a tiny model's backward pass.
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)


def _build_lion(
    parameters: Sequence[torch.nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    # Given, not left to be found out at the first step: a resumed optimiser starts with its state already there.
    low_precision = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in parameters)
    lion: torch.optim.Optimizer = Lion(
        parameters,
        lr=learning_rate,
        betas=(0.9, 0.99),
        weight_decay=weight_decay,
        kahan_sum=low_precision,
        foreach=False,
        triton=False,
    )
    # Set here, as optimi's constructor warns that foreach gives way to Triton, which a CPU does not have: one kernel
    # over hundreds of small tensors instead of four for each.
    for group in lion.param_groups:
        group["foreach"] = True
    return lion


_BUILDERS: Mapping[str, Callable[[Sequence[torch.nn.Parameter], float, float], torch.optim.Optimizer]] = {
    "adamw": _build_adamw,
    "optimi-lion": _build_lion,
}


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use this learning rate from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All state of an optimiser, as `<parameter index>.<name>`, in a fixed order, on the CPU.

    With the parameters and the learning rate it is everything that a resumed run needs.
    """
    tensors: dict[str, torch.Tensor] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        for name in sorted(state):
            if isinstance(state[name], torch.Tensor):
                tensors[f"{index:05d}.{name}"] = state[name].detach().cpu().clone()
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Take up the state that `optimizer_tensors` gave, in an optimiser of the same kind over the same parameters.

    Raises:
        ValueError: a tensor belongs to no parameter, or has another shape.
    """
    parameters = _parameters(optimizer)
    states: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index_text, _, name = key.partition(".")
        index = int(index_text) if index_text.isdigit() else len(parameters)
        if not name or index >= len(parameters):
            raise ValueError(f"optimiser state {key!r} belongs to none of the {len(parameters)} parameters")
        parameter = parameters[index]
        if tensor.ndim and tensor.shape != parameter.shape:
            raise ValueError(
                f"optimiser state {key!r} has shape {tuple(tensor.shape)}, its parameter {tuple(parameter.shape)}"
            )
        states.setdefault(index, {})[name] = tensor.to(parameter.device, copy=True)
    for index, state in states.items():
        if isinstance(optimizer, Lion):
            # Lion keeps None where no Kahan compensation is needed, and takes the key as the sign of a ready state.
            state.setdefault("kahan_comp", None)
        optimizer.state[parameters[index]] = state


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


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
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit and method == "value":
        torch._foreach_clamp_max_(gradients, limit)
        torch._foreach_clamp_min_(gradients, -limit)
    elif limit:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def learning_rate_at(
    schedule: str, step: int, *, learning_rate: float, warmup_steps: int = 0, max_steps: int = 0
) -> float:
    """Learning rate of a step.

    Linear from 0 over the warm-up: step 1 has 1 / warmup_steps of the rate, step `warmup_steps` all of it. Then
    constant, or half a cosine that ends at 0 after the last step.

    Args:
        step: from 1.
        max_steps: steps of the whole job; only `cosine` needs it.

    Raises:
        ValueError: unknown schedule, or a step before the first.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"learning-rate schedule {schedule!r} is unknown; use one of {', '.join(SCHEDULES)}")
    if step < 1:
        raise ValueError(f"step {step} is before the first, which is 1")
    if step <= warmup_steps:
        return learning_rate * step / warmup_steps
    if schedule == "constant_with_warmup":
        return learning_rate
    progress = min(1.0, (step - 1 - warmup_steps) / max(1, max_steps - warmup_steps))
    return learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
