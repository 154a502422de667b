"""One optimiser step of a frozen transformer with its adapter (spec 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import diffusers
import torch

from reverie_hidream.adapters.lokr import LokrAdapter
from reverie_hidream.flow import flow_loss, noisy_latents, timesteps_of, velocity_target
from reverie_hidream.optimizers import AdapterUpdate, NonFiniteLossError
from reverie_hidream.training.batch import Batch
from reverie_hidream.training.objective import ObjectiveSettings
from reverie_hidream.transformer import enable_gradient_checkpointing, predict_velocity

__all__ = ["NonFiniteLossError", "StepResult", "StepSettings", "TrainingStep"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSettings:
    """What a step needs besides the model, the adapter and the optimizer."""

    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Figures of one optimiser step."""

    loss: float
    """Mean over the samples of the step."""
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


class TrainingStep:
    """Owned by one thread."""

    def __init__(
        self,
        transformer: diffusers.HiDreamImageTransformer2DModel,
        adapter: LokrAdapter,
        update: AdapterUpdate,
        settings: StepSettings,
        *,
        learning_rate: Callable[[int], float],
    ) -> None:
        """Make the model ready to train.

        Args:
            adapter: attached to the transformer.
            update: over the adapter's parameters; it clips their gradients and steps them.
            learning_rate: of a step, counted from 1.
        """
        self._transformer = transformer
        self._adapter = adapter
        self._update = update
        self._settings = settings
        self._learning_rate = learning_rate
        self._device = transformer.x_embedder.proj.bias.device
        enable_gradient_checkpointing(transformer, settings.gradient_checkpointing)
        transformer.train()

    def train_step(self, step: int, batches: Iterable[Batch]) -> StepResult:
        """Take one optimiser step over `gradient_accumulation_steps` micro-batches. Blocks.

        Raises:
            NonFiniteLossError: the message says whether the adapter was changed.
        """
        learning_rate = self._learning_rate(step)
        self._update.begin(learning_rate)
        loss = torch.zeros((), device=self._device)
        try:
            for batch in batches:
                loss += self._accumulate(batch)
            figures = self._update.finish(loss)
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"step {step}: {error}") from error
        return StepResult(
            loss=figures.loss,
            learning_rate=learning_rate,
            gradient_norm=figures.norm,
            gradient_absmax=figures.absmax,
        )

    def _accumulate(self, batch: Batch) -> torch.Tensor:
        """Add one micro-batch's share to the gradient; returns its share of the loss. ()"""
        loss = self._loss(batch) / self._settings.gradient_accumulation_steps
        self._update.accept(loss)
        loss.backward()
        return loss.detach()

    def _loss(self, batch: Batch) -> torch.Tensor:
        latents, noise = batch.latents.to(self._device), batch.noise.to(self._device)
        sigmas = batch.draws.sigmas.to(self._device)
        prediction = predict_velocity(
            self._transformer, noisy_latents(latents, noise, sigmas), timesteps_of(sigmas), batch.conditioning
        )
        return flow_loss(prediction, velocity_target(latents, noise))
