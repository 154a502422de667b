"""One job's model in training: the frozen transformer, its adapter, the optimiser, and one step of them (spec 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import diffusers
import torch
from reverie_common.storage import RawTensor
from reverie_hidream.adapters.lokr import LokrAdapter
from reverie_hidream.flow import flow_loss, noisy_latents, sample_sigmas, timesteps_of, velocity_target
from reverie_hidream.optimizers import (
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from reverie_hidream.tensor_io import from_raw, to_raw
from reverie_hidream.transformer import enable_gradient_checkpointing, predict_velocity

from reverie_trainer.jobs.spec import Optimization
from reverie_trainer.worker.data import Batch

_ADAPTER, _OPTIMIZER = "adapter/", "optimizer/"


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient is infinite or not a number; the adapter is as it was before the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Figures of one optimiser step."""

    loss: float
    """Mean over the samples of the step."""
    learning_rate: float
    gradient_norm: float
    """Of the whole gradient, before clipping."""


class TrainingEngine:
    """Owned by one thread."""

    def __init__(
        self,
        transformer: diffusers.HiDreamImageTransformer2DModel,
        adapter: LokrAdapter,
        optimization: Optimization,
    ) -> None:
        """Build the optimiser over the adapter, which must be attached.

        Raises:
            ValueError: the optimizer is unknown.
        """
        self._transformer = transformer
        self._adapter = adapter
        self._optimization = optimization
        self._device = transformer.x_embedder.proj.bias.device
        self._parameters = list(adapter.parameters())
        self._optimizer = build_optimizer(
            optimization.optimizer,
            self._parameters,
            learning_rate=optimization.learning_rate,
            weight_decay=optimization.weight_decay,
        )
        enable_gradient_checkpointing(transformer, optimization.gradient_checkpointing)
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
        norm = clip_gradients(self._parameters, self._optimization.grad_clip_method, self._optimization.max_grad_norm)
        # The only time in a step that the host waits for the device.
        loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise NonFiniteLossError(f"the loss at step {step} is {loss_value}, the norm of its gradient {norm_value}")
        set_learning_rate(self._optimizer, learning_rate)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(loss=loss_value, learning_rate=learning_rate, gradient_norm=norm_value)

    def export(self, metadata: Mapping[str, str]) -> bytes:
        """The adapter as the file that LyCORIS and ComfyUI load (spec 4.6)."""
        return self._adapter.export(metadata)

    def state(self) -> dict[str, RawTensor]:
        """Everything that a resume needs besides the step: a copy, which training does not change."""
        adapter = {f"{_ADAPTER}{name}": tensor for name, tensor in self._adapter.raw_state().items()}
        optimizer = {f"{_OPTIMIZER}{name}": tensor for name, tensor in optimizer_tensors(self._optimizer).items()}
        return {name: to_raw(tensor.detach().clone()) for name, tensor in {**adapter, **optimizer}.items()}

    def load_state(self, state: Mapping[str, RawTensor]) -> None:
        """Take up what `state` gave.

        Raises:
            ValueError: it is that of another adapter or optimiser.
        """
        tensors = {name: from_raw(raw) for name, raw in state.items()}
        self._adapter.load_raw_state(_under(_ADAPTER, tensors))
        load_optimizer_tensors(self._optimizer, _under(_OPTIMIZER, tensors))

    def _learning_rate(self, step: int) -> float:
        return learning_rate_at(
            self._optimization.lr_scheduler,
            step,
            learning_rate=self._optimization.learning_rate,
            warmup_steps=self._optimization.lr_warmup_steps,
            max_steps=self._optimization.max_steps,
        )

    def _accumulate(self, batch: Batch) -> torch.Tensor:
        """Add one micro-batch's share to the gradient; returns its share of the loss. ()"""
        loss = self._loss(batch) / self._optimization.gradient_accumulation_steps
        loss.backward()
        return loss.detach()

    def _loss(self, batch: Batch) -> torch.Tensor:
        latents, noise = batch.latents.to(self._device), batch.noise.to(self._device)
        sigmas = sample_sigmas(
            batch.timestep_draws.to(self._device),
            shift=self._optimization.flow_schedule_shift,
            sigmoid_scale=self._optimization.flow_sigmoid_scale,
        )
        prediction = predict_velocity(
            self._transformer, noisy_latents(latents, noise, sigmas), timesteps_of(sigmas), batch.conditioning
        )
        return flow_loss(prediction, velocity_target(latents, noise))


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
