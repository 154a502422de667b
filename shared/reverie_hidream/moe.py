"""Mixture of experts with gradients through experts and gate (spec 2).

diffusers' inference path runs the routed experts under no_grad, and its training path finds each expert's tokens with
boolean masks, two host synchronisations for each expert. Here tokens are sorted by expert once, so that each expert
sees one contiguous slice; one host synchronisation for each layer, none with grouped GEMM.

T tokens of the whole batch, D width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

_STACKS = "_reverie_stacks"


class RouterUse(NamedTuple):
    """How one layer's router spread the tokens of a batch; float32, float64 for a float64 model."""

    scores: torch.Tensor
    """(E,): mean of the router's scores over the tokens, with its gradient."""
    shares: torch.Tensor
    """(E,): share of the assignments that went to each expert, without a gradient."""
    entropy: torch.Tensor
    """(): of the scores in nats, mean over the tokens, without a gradient."""


class Routing(NamedTuple):
    """What a router decided."""

    weights: torch.Tensor
    """(T, K): raw softmax values, not renormalised (spec 2.1)."""
    experts: torch.Tensor
    """(T, K): indices of the experts."""
    scores: torch.Tensor
    """(T, E): softmax over the experts."""


def moe_forward(moe: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Routed experts, weighted by the gate's raw softmax values, plus the shared expert.

    Args:
        moe: diffusers' `MOEFeedForwardSwiGLU`.
        hidden: (B, S, D).
    """
    return _mix(moe, hidden, route(moe, hidden.reshape(-1, hidden.shape[-1])))


def watched_moe_forward(
    moe: nn.Module, hidden: torch.Tensor, token_counts: torch.Tensor
) -> tuple[torch.Tensor, RouterUse]:
    """As `moe_forward`, and how the router spread the tokens.

    Args:
        token_counts: (S,) float32: how many tokens of the unfolded sequence each one stands for.
    """
    routing = route(moe, hidden.reshape(-1, hidden.shape[-1]))
    return _mix(moe, hidden, routing), router_use(routing, token_counts)


def route(moe: nn.Module, tokens: torch.Tensor) -> Routing:
    """Choose the experts of each token (spec 2.1)."""
    gate: Any = moe.gate
    scores = functional.linear(tokens, gate.weight).softmax(dim=-1)
    weights, experts = torch.topk(scores, k=gate.top_k, dim=-1, sorted=False)
    return Routing(weights, experts, scores)


def router_use(routing: Routing, token_counts: torch.Tensor) -> RouterUse:
    """Sum up what a router decided.

    Args:
        token_counts: (S,) float32, where T is B * S.
    """
    scores = routing.scores.to(torch.promote_types(routing.scores.dtype, torch.float32))
    num_samples = scores.shape[0] // token_counts.shape[0]
    portions = (token_counts / (num_samples * token_counts.sum())).to(scores.dtype).repeat(num_samples)
    with torch.no_grad():
        num_experts, per_token = scores.shape[-1], routing.experts.shape[-1]
        assigned = functional.one_hot(routing.experts, num_experts).sum(dim=1).to(scores.dtype)
        shares = portions @ assigned / per_token
        entropy = portions @ torch.special.entr(scores).sum(dim=-1)
    return RouterUse(portions @ scores, shares, entropy)


def load_balancing_loss(uses: Sequence[RouterUse]) -> torch.Tensor:
    """sum over experts of E * share * mean score, mean over the layers: 1 where all are balanced (spec 2.3). ()

    The gradient flows through the scores alone; a share is a count and has none.
    """
    scores = torch.stack([use.scores for use in uses])
    shares = torch.stack([use.shares for use in uses])
    return (scores * shares).sum(dim=-1).mean() * scores.shape[-1]


def _mix(moe: nn.Module, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
    routed = _routed_experts(moe, hidden.reshape(-1, hidden.shape[-1]), routing.weights, routing.experts)
    shared: torch.Tensor = moe.shared_experts(hidden)  # type: ignore[operator]  # nn.Module attributes are untyped
    return routed.view(hidden.shape) + shared


def _routed_experts(moe: nn.Module, tokens: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    modules: Any = moe.experts
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    sorted_tokens = _dispatch(tokens, order, inverse)
    stacked = _stacked_weights(modules, tokens)
    if stacked is not None:
        ends = functional.one_hot(flat, len(modules)).sum(dim=0).cumsum(0)
        sorted_outputs = _grouped_swiglu(sorted_tokens, stacked, ends.to(torch.int32))
    else:
        # An expert without tokens still runs, on none: its adapter then has a gradient of zeros like every other.
        chunks = sorted_tokens.split(torch.bincount(flat, minlength=len(modules)).tolist())
        sorted_outputs = torch.cat([expert(chunk) for expert, chunk in zip(modules, chunks, strict=True)])
    outputs = _collect(sorted_outputs, order, inverse).view(*weights.shape, -1)
    # (1, K) @ (K, D) for each token: the weighted sum in one pass, without the (T, K, D) product in memory.
    combined: torch.Tensor = torch.bmm(weights.unsqueeze(1).to(outputs.dtype), outputs).squeeze(1)
    return combined


def _dispatch(tokens: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    dispatched: torch.Tensor = _Dispatch.apply(tokens, order, inverse)  # type: ignore[no-untyped-call]  # torch's own
    return dispatched


def _collect(outputs: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    collected: torch.Tensor = _Collect.apply(outputs, order, inverse)  # type: ignore[no-untyped-call]  # torch's own
    return collected


class _Dispatch(torch.autograd.Function):
    """Copy each token to its K places in the order of the experts.

    As plain indexing its backward would be an atomic scatter-add: slow, and not deterministic on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.num_tokens = tokens.shape[0]
        return tokens.index_select(0, order // (order.numel() // tokens.shape[0]))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        by_token = gradient.index_select(0, inverse).view(ctx.num_tokens, -1, gradient.shape[-1])
        return by_token.sum(dim=1), None, None


class _Collect(torch.autograd.Function):
    """Bring the experts' outputs back into the order of the tokens."""

    @staticmethod
    def forward(ctx: Any, outputs: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order)
        return outputs.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return gradient.index_select(0, order), None, None


def stack_experts(moe: nn.Module) -> None:
    """Make the experts' weights views of three stacked buffers, which grouped GEMM needs; names and values stay.

    Args:
        moe: diffusers' `MOEFeedForwardSwiGLU` with plain, frozen experts on one device.
    """
    stacks: dict[str, torch.Tensor] = {}
    experts: Any = moe.experts
    for name in ("w1", "w2", "w3"):
        stack = torch.stack([getattr(expert, name).weight.detach() for expert in experts])
        for index, expert in enumerate(experts):
            getattr(expert, name).weight.data = stack[index]
        stacks[name] = stack
    # A plain attribute: a registered buffer would add names to the state dict.
    object.__setattr__(experts, _STACKS, stacks)


def unstack_experts(module: nn.Module) -> bool:
    """Let go of the stacked buffers of a mixture of experts; returns whether there were any. The weights stay."""
    experts = getattr(module, "experts", None)
    return experts is not None and vars(experts).pop(_STACKS, None) is not None


def _stacked_weights(experts: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """The stacked weights, when they may be used: still those of the experts, and no adapter on any of them."""
    stacks: dict[str, torch.Tensor] | None = getattr(experts, _STACKS, None)
    if stacks is None or tokens.dtype != stacks["w1"].dtype:
        return None
    for name, stack in stacks.items():
        for index, expert in enumerate(experts):
            linear = getattr(expert, name)
            # An adapter sets `forward` on the instance; moving or loading the model replaces the weight's memory; and
            # the stack is no part of the graph, so that weights which are trained would get no gradient.
            is_stacked = linear.weight.data_ptr() == stack[index].data_ptr()
            if "forward" in vars(linear) or linear.weight.requires_grad or not is_stacked:
                return None
    return stacks


def _grouped_swiglu(tokens: torch.Tensor, stacks: dict[str, torch.Tensor], ends: torch.Tensor) -> torch.Tensor:
    """w2(silu(w1 x) * w3 x) for all experts at once; `ends` (E,) int32 are the ends of the experts' slices."""
    gate = functional.grouped_mm(tokens, stacks["w1"].transpose(1, 2), offs=ends)
    up = functional.grouped_mm(tokens, stacks["w3"].transpose(1, 2), offs=ends)
    down: torch.Tensor = functional.grouped_mm(functional.silu(gate) * up, stacks["w2"].transpose(1, 2), offs=ends)
    return down
