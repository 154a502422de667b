"""The adapter of one Linear, and how it hooks into the Linear's forward.

A branch computes the change of the Linear's output; it never touches the Linear's weight, so that it works beside a
quantised one. Several branches on one Linear add up.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from reverie_hidream.adapters.dropout import BranchDropout
from reverie_hidream.host_blocks import weights_at_hand


@dataclass(frozen=True, slots=True)
class LinearCall:
    """One call of a Linear, as it is without any adapter."""

    linear: nn.Module
    hidden: torch.Tensor
    """Its input, (..., in_features)."""
    output: torch.Tensor
    """Its output, (..., out_features), bias included."""
    forward: Any
    """Its own forward."""

    @property
    def product(self) -> torch.Tensor:
        """The output without the bias."""
        return self._without_bias(self.output)

    def again(self, hidden: torch.Tensor) -> torch.Tensor:
        """The Linear's product with another input, without the bias."""
        return self._without_bias(self.forward(hidden))

    def weight(self) -> torch.Tensor:
        """The dense weight, (out_features, in_features)."""
        return dense_weight(self.linear, self.forward, self.hidden.dtype)

    def _without_bias(self, output: torch.Tensor) -> torch.Tensor:
        bias = getattr(self.linear, "bias", None)
        return output if bias is None else output - bias.to(output.dtype)


class Branch(abc.ABC):
    """One adapted Linear.

    Not an nn.Module: it must not become part of the model that it is hooked into.
    """

    def __init__(self, name: str, *, out_features: int, in_features: int, multiplier: float = 1.0) -> None:
        """Make a branch at full strength.

        Args:
            name: `lycoris_<dotted path with _>`.
            multiplier: of the configuration; counts on top of the strength.
        """
        self.name = name
        self.out_features = out_features
        self.in_features = in_features
        self.multiplier = multiplier
        self.strength = 1.0
        self.dropout: BranchDropout | None = None
        self.drops_rows = True
        """Whether rank dropout leaves out rows of the weight's change; a low-rank branch leaves out ranks itself."""
        self.drops_change = True
        """Whether dropout leaves out elements of the change; PEFT's leaves out inputs."""

    @abc.abstractmethod
    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The trained tensors as they are, in a fixed order."""

    @abc.abstractmethod
    def move(self, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Move the tensors of a frozen branch."""

    @abc.abstractmethod
    def change_of(self, call: LinearCall) -> torch.Tensor:
        """What the adapter adds to a Linear's output at its strength, in the dtype of the input. (..., out_features)"""

    @abc.abstractmethod
    def weight_change(self, weight: torch.Tensor, /) -> torch.Tensor:
        """The same as a change of the dense weight (out_features, in_features); computed in the branch's dtype."""

    @abc.abstractmethod
    def exported(self) -> dict[str, torch.Tensor]:
        """The module's tensors in a file of LyCORIS, alpha included, by their names after the module's."""

    def bias_change(self) -> torch.Tensor | None:
        """The change of the Linear's bias, (out_features,); None for none."""
        return None

    @property
    def total_strength(self) -> float:
        """Strength and multiplier together."""
        return self.strength * self.multiplier

    def adapt(self, call: LinearCall) -> torch.Tensor:
        """What to add to the Linear's output, dropouts included."""
        dropout = self.dropout
        if dropout is None or not dropout.is_active:
            return self.change_of(call)
        if dropout.leaves_out_module():
            return self._nothing(call.output)
        change = self.change_of(call)
        if self.drops_rows and (mask := dropout.rank_mask(self.out_features, change)) is not None:
            change = change * mask
        return dropout.elements(change) if self.drops_change else change

    def _nothing(self, output: torch.Tensor) -> torch.Tensor:
        # A gradient of zeros and not none, so that every optimizer keeps a state for every tensor from the first step.
        sums = [0.0 * tensor.sum() for _, tensor in self.named_tensors()]
        return torch.stack(sums).sum().to(output.dtype)


class _AdaptedForward:
    """Stands in for a Linear's forward: the Linear's own result plus the changes of its branches."""

    def __init__(self, linear: nn.Module) -> None:
        self._linear = linear
        self._linear_forward = linear.forward
        self.branches: list[Branch] = []

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        own: torch.Tensor = self._linear_forward(hidden)
        call = LinearCall(self._linear, hidden, own, self._linear_forward)
        output = own
        for branch in self.branches:
            if branch.strength:
                output = output + branch.adapt(call)
        return output


def hook(linear: nn.Module, branch: Branch) -> None:
    """Let the Linear, plain or quantised, add the branch's change to its output.

    Raises:
        ValueError: the branch is made for a layer of another size.
    """
    layer: Any = linear
    if (layer.out_features, layer.in_features) != (branch.out_features, branch.in_features):
        raise ValueError(
            f"{branch.name} changes a {branch.out_features}x{branch.in_features} weight, "
            f"the layer has {layer.out_features}x{layer.in_features}: the adapter is for another model"
        )
    adapted = vars(linear).get("forward")
    if not isinstance(adapted, _AdaptedForward):
        adapted = _AdaptedForward(linear)
        # An attribute of the instance hides the method of the class; deleting it restores the class's forward exactly.
        linear.forward = adapted
    adapted.branches.append(branch)


def unhook(linear: nn.Module, branch: Branch) -> None:
    """Take the branch off again; with the last one the Linear's forward is what it was. Does nothing twice."""
    adapted = vars(linear).get("forward")
    if not isinstance(adapted, _AdaptedForward):
        return
    adapted.branches = [other for other in adapted.branches if other is not branch]
    if not adapted.branches:
        del cast("Any", linear).forward


def is_plain(linear: nn.Module) -> bool:
    """Whether the weight is an ordinary tensor of floating point numbers, so that it can be changed in place."""
    weight = getattr(linear, "weight", None)
    return type(weight) is nn.Parameter and weight.is_floating_point()


@torch.no_grad()
def dense_weight(linear: nn.Module, forward: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The Linear's weight as an ordinary tensor, (out_features, in_features).

    That of a quantised Linear is read off its products with unit vectors: exactly what its forward uses, whatever holds
    it.

    Args:
        forward: the Linear's own.
        dtype: of the computation, for a quantised one; None for that of its scales.
    """
    layer: Any = linear
    device = weights_at_hand(linear)
    if is_plain(linear):
        weight: torch.Tensor = layer.weight.detach()
        return weight
    if dtype is None:
        dtype = layer.weight.dtype if layer.weight.is_floating_point() else torch.float32
    units = torch.eye(layer.in_features, dtype=dtype, device=device)
    columns: torch.Tensor = forward(units)
    return (columns if layer.bias is None else columns - layer.bias.to(dtype)).t().contiguous()
