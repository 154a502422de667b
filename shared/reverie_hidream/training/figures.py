"""The figures of one optimiser step: gathered on the device, read by the host once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reverie_hidream.moe import RouterUse
from reverie_hidream.optimizers import GradientFigures
from reverie_hidream.training.batch import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Figures of one optimiser step."""

    loss: float
    """Mean over the samples of the step, without the load-balancing loss."""
    learning_rate: float
    gradient_norm: float
    """Of the whole gradient, before clipping."""
    gradient_absmax: float = 0.0
    """Largest element of the gradient, before clipping."""
    load_balancing_loss: float | None = None
    """Before its weight; 1 is a perfect balance. None where it is off."""
    regularisation_loss: float | None = None
    """Mean over the regularisation samples of the step; None in a step without any."""
    expert_load: tuple[float, ...] = ()
    """Share of the routed tokens that each expert got, mean over the layers. Empty without routed experts."""
    router_entropy: float | None = None
    """Of the router's scores in nats, mean over tokens and layers. None without routed experts."""
    rollout_share: float | None = None
    """Share of the samples that were rolled out; None where that is off."""


class StepFigures:
    """Grows by one micro-batch at a time."""

    def __init__(self, *, num_batches: int, device: torch.device) -> None:
        """Start at zero.

        Args:
            num_batches: micro-batches of the step.
        """
        self.loss = torch.zeros((), device=device)
        """() sum of the micro-batches' shares of the loss."""
        self._num_batches = num_batches
        self._regularisation: list[torch.Tensor] = []
        self._balance: list[torch.Tensor] = []
        self._uses: list[RouterUse] = []
        self._rolled_out: list[int] = []
        self._num_samples = 0
        self._names: list[str] = []

    def add(self, batch: Batch, loss: torch.Tensor, balance: torch.Tensor | None, uses: Sequence[RouterUse]) -> None:
        """Take up one micro-batch's figures, none with a gradient.

        Args:
            loss: () mean over its samples.
            balance: () load-balancing loss before its weight.
        """
        self.loss += loss / self._num_batches
        if batch.is_regularisation:
            self._regularisation.append(loss)
        if balance is not None:
            self._balance.append(balance)
        self._uses.extend(uses)
        self._num_samples += batch.num_samples
        if batch.draws.rollout_offsets:
            self._rolled_out.append(len(batch.rolled_out))

    def others(self) -> list[torch.Tensor]:
        """The figures besides the loss, () each."""
        named: list[tuple[str, torch.Tensor]] = []
        if self._balance:
            named.append(("load_balancing_loss", torch.stack(self._balance).mean()))
        if self._regularisation:
            named.append(("regularisation_loss", torch.stack(self._regularisation).mean()))
        if self._uses:
            named.append(("router_entropy", torch.stack([use.entropy for use in self._uses]).mean()))
            shares = torch.stack([use.shares for use in self._uses]).mean(dim=0)
            named.extend(("expert_load", share) for share in shares.unbind())
        self._names = [name for name, _ in named]
        return [figure for _, figure in named]

    def result(self, read: GradientFigures, *, learning_rate: float) -> StepResult:
        """The figures as numbers.

        Args:
            read: with the values of `others`.
        """
        values: dict[str, list[float]] = {}
        for name, value in zip(self._names, read.others, strict=True):
            values.setdefault(name, []).append(value)
        return StepResult(
            loss=read.loss,
            learning_rate=learning_rate,
            gradient_norm=read.norm,
            gradient_absmax=read.absmax,
            load_balancing_loss=_only(values.get("load_balancing_loss")),
            regularisation_loss=_only(values.get("regularisation_loss")),
            expert_load=tuple(values.get("expert_load", ())),
            router_entropy=_only(values.get("router_entropy")),
            rollout_share=sum(self._rolled_out) / self._num_samples if self._rolled_out else None,
        )


def _only(values: Sequence[float] | None) -> float | None:
    return values[0] if values else None
