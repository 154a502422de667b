"""One optimiser step of a frozen transformer with its adapter (spec 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import diffusers
import torch

from reverie_hidream.adapters.lokr import LokrAdapter
from reverie_hidream.flow import flow_loss, noisy_latents, timesteps_of, velocity_target
from reverie_hidream.optimizers import clip_gradients, set_learning_rate
from reverie_hidream.training.batch import Batch
from reverie_hidream.training.objective import ObjectiveSettings
from reverie_hidream.transformer import enable_gradient_checkpointing, predict_velocity


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient is infinite or not a number; the adapter is as it was before the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSettings:
    """What a step needs besides the model, the adapter and the optimizer."""

    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = True
    max_grad_norm: float = 2.0
    grad_clip_method: str = "value"


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
        optimizer: torch.optim.Optimizer,
        settings: StepSettings,
        *,
        learning_rate: Callable[[int], float],
    ) -> None:
        """Make the model ready to train.

        Args:
            adapter: attached to the transformer.
            optimizer: over the adapter's parameters.
            learning_rate: of a step, counted from 1.
        """
        self._transformer = transformer
        self._adapter = adapter
        self._optimizer = optimizer
        self._settings = settings
        self._learning_rate = learning_rate
        self._device = transformer.x_embedder.proj.bias.device
        self._parameters = list(adapter.parameters())
        enable_gradient_checkpointing(transformer, settings.gradient_checkpointing)
        transformer.train()

    def train_step(self, step: int, batches: Iterable[Batch]) -> StepResult:
        """Take one optimiser step over `gradient_accumulation_steps` micro-batches. Blocks.

        Raises:
            NonFiniteLossError: nothing was changed.
        """
        learning_rate = self._learning_rate(step)
        loss = torch.zeros((), device=self._device)
        for batch in batches:
            loss += self._accumulate(batch)
        norm = clip_gradients(self._parameters, self._settings.grad_clip_method, self._settings.max_grad_norm)
        # The only time in a step that the host waits for the device.
        loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise NonFiniteLossError(f"the loss at step {step} is {loss_value}, the norm of its gradient {norm_value}")
        set_learning_rate(self._optimizer, learning_rate)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(loss=loss_value, learning_rate=learning_rate, gradient_norm=norm_value)

    def _accumulate(self, batch: Batch) -> torch.Tensor:
        """Add one micro-batch's share to the gradient; returns its share of the loss. ()"""
        loss = self._loss(batch) / self._settings.gradient_accumulation_steps
        loss.backward()
        return loss.detach()

    def _loss(self, batch: Batch) -> torch.Tensor:
        latents, noise = batch.latents.to(self._device), batch.noise.to(self._device)
        sigmas = batch.draws.sigmas.to(self._device)
        prediction = predict_velocity(
            self._transformer, noisy_latents(latents, noise, sigmas), timesteps_of(sigmas), batch.conditioning
        )
        return flow_loss(prediction, velocity_target(latents, noise))
