"""One optimiser step of a frozen transformer with its adapter (spec 3).

B batch, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import diffusers
import torch

from reverie_hidream.adapters.adapter import TrainableAdapter
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.flow import noisy_latents, timesteps_of, velocity_target
from reverie_hidream.moe import RouterUse, load_balancing_loss
from reverie_hidream.optimizers import AdapterUpdate, NonFiniteLossError
from reverie_hidream.training.batch import Batch
from reverie_hidream.training.evaluation import Evaluation, EvaluationBatch, evaluate
from reverie_hidream.training.figures import StepFigures, StepResult
from reverie_hidream.training.objective import (
    ObjectiveSettings,
    mask_weights,
    mean_losses,
    pixel_losses,
    reflexflow_losses,
)
from reverie_hidream.training.rollout import roll_out
from reverie_hidream.transformer import enable_gradient_checkpointing, predict_velocity

__all__ = ["NonFiniteLossError", "StepResult", "StepSettings", "TrainingStep"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSettings:
    """What a step needs besides the model, the adapter and its update."""

    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class _Inputs:
    """What one micro-batch's forward pass takes, on the model's device."""

    latents: torch.Tensor
    noise: torch.Tensor
    sigmas: torch.Tensor
    noisy: torch.Tensor
    conditioning: TextConditioning


class TrainingStep:
    """Owned by one thread."""

    def __init__(
        self,
        transformer: diffusers.HiDreamImageTransformer2DModel,
        adapter: TrainableAdapter,
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
        figures = StepFigures(num_batches=self._settings.gradient_accumulation_steps, device=self._device)
        try:
            for index, batch in enumerate(batches):
                self._adapter.begin_step(step, index)
                self._accumulate(batch, figures, is_first=index == 0)
            read = self._update.finish(figures.loss, figures.others())
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"step {step}: {error}") from error
        return figures.result(read, learning_rate=learning_rate)

    def evaluate(
        self,
        batches: Iterable[EvaluationBatch],
        *,
        num_timesteps: int = 28,
        on_progress: Callable[[int], None] | None = None,
    ) -> Evaluation:
        """Measure the stable evaluation loss, see `evaluate`; training goes on as if it had not been."""
        objective = self._settings.objective
        with _at_rest(self._adapter):
            return evaluate(self._transformer, batches, objective, num_timesteps=num_timesteps, on_progress=on_progress)

    def _accumulate(self, batch: Batch, figures: StepFigures, *, is_first: bool) -> None:
        """Add one micro-batch's share to the gradient."""
        objective = self._settings.objective
        # The router costs little to watch, and one micro-batch tells enough where its loss is off.
        uses: list[RouterUse] | None = [] if is_first or objective.use_load_balancing_loss else None
        loss = self._sample_losses(batch, uses).mean()
        balance = load_balancing_loss(uses) if uses and objective.use_load_balancing_loss else None
        total = loss
        # A regularisation sample keeps the model as it was, and so its router.
        if balance is not None and not batch.is_regularisation:
            total = loss + objective.load_balancing_loss_weight * balance
        share = total / self._settings.gradient_accumulation_steps
        self._update.accept(share)
        share.backward()
        figures.add(batch, loss.detach(), None if balance is None else balance.detach(), uses or ())

    def _sample_losses(self, batch: Batch, uses: list[RouterUse] | None) -> torch.Tensor:
        """(B,), at least float32."""
        inputs = self._inputs(batch)
        # Before the pass that is trained: switching off a full-rank adapter writes over the weights that its backward
        # pass needs.
        target = self._target(batch, inputs)
        prediction = self._velocity(inputs, inputs.noisy, inputs.sigmas, uses=uses)
        objective = self._settings.objective
        losses = pixel_losses(prediction, target, inputs.sigmas, objective)
        weights = None
        if batch.masks is not None:
            weights = mask_weights(batch.masks.to(self._device), batch.mask_type, batch.draws.uses_mask)
        means = mean_losses(losses, weights, by_area=objective.masked_loss_normalise_area)
        return self._reflected(batch, inputs, prediction, losses, weights, means)

    def _inputs(self, batch: Batch) -> _Inputs:
        draws = batch.draws
        latents, noise = batch.latents.to(self._device), draws.noise.to(self._device)
        inputs = _Inputs(
            latents=latents,
            noise=noise,
            sigmas=draws.sigmas.to(self._device),
            noisy=latents,
            conditioning=batch.conditioning.to(self._device, self._transformer.x_embedder.proj.bias.dtype),
        )
        input_noise = noise if draws.perturbation is None else noise + draws.perturbation.to(self._device)
        if batch.rolled_out:
            noisy = self._rolled_out(batch, inputs, input_noise)
        else:
            levels = inputs.sigmas if draws.input_sigmas is None else draws.input_sigmas.to(self._device)
            noisy = noisy_latents(latents, input_noise, levels)
        return replace(inputs, noisy=noisy)

    def _rolled_out(self, batch: Batch, inputs: _Inputs, input_noise: torch.Tensor) -> torch.Tensor:
        objective = self._settings.objective
        if objective.rollout is None:
            raise ValueError("the batch has samples to roll out, but the settings do not say how")

        def velocity(noisy: torch.Tensor, sigmas: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
            return self._velocity(inputs, noisy, sigmas, places=places)

        with _at_rest(self._adapter):
            return roll_out(
                velocity,
                inputs.latents,
                input_noise,
                inputs.sigmas,
                batch.draws.rollout_offsets,
                shift=objective.shift_for(*inputs.latents.shape[-2:]),
                settings=objective.rollout,
            )

    def _target(self, batch: Batch, inputs: _Inputs) -> torch.Tensor:
        if not batch.is_regularisation:
            return velocity_target(inputs.latents, inputs.noise)
        with torch.no_grad(), _without(self._adapter):
            return self._velocity(inputs, inputs.noisy, inputs.sigmas)

    def _reflected(
        self,
        batch: Batch,
        inputs: _Inputs,
        prediction: torch.Tensor,
        losses: torch.Tensor,
        weights: torch.Tensor | None,
        means: torch.Tensor,
    ) -> torch.Tensor:
        """The means with ReflexFlow's in the place of those of rolled-out samples, where that is asked for. (B,)"""
        objective = self._settings.objective
        places = batch.rolled_out
        if objective.rollout is None or objective.rollout.reflexflow is None or not places:
            return means
        plain = noisy_latents(inputs.latents[places], inputs.noise[places], inputs.sigmas[places])
        with torch.no_grad(), _at_rest(self._adapter):
            clean_prediction = self._velocity(inputs, plain, inputs.sigmas[places], places=places)
        reflected = reflexflow_losses(
            prediction[places],
            losses[places],
            clean_prediction=clean_prediction,
            displacement=inputs.noisy[places] - inputs.latents[places],
            settings=objective.rollout.reflexflow,
            weights=None if weights is None else weights[places],
            by_area=objective.masked_loss_normalise_area,
        )
        return means.index_copy(0, torch.tensor(places, device=self._device), reflected)

    def _velocity(
        self,
        inputs: _Inputs,
        noisy: torch.Tensor,
        sigmas: torch.Tensor,
        *,
        places: Sequence[int] | None = None,
        uses: list[RouterUse] | None = None,
    ) -> torch.Tensor:
        """The model's velocity, for all samples or for those at some places of the batch."""
        conditioning = inputs.conditioning if places is None else inputs.conditioning.select(places)
        return predict_velocity(self._transformer, noisy, timesteps_of(sigmas), conditioning, uses)


@contextmanager
def _at_rest(adapter: TrainableAdapter) -> Iterator[None]:
    """The adapter as it is used and not as it is trained: without dropouts."""
    adapter.train(False)
    try:
        yield
    finally:
        adapter.train(True)


@contextmanager
def _without(adapter: TrainableAdapter) -> Iterator[None]:
    """The model as it is without the adapter."""
    adapter.set_strength(0.0)
    try:
        yield
    finally:
        # As trained: the configuration's own multiplier counts on top of this.
        adapter.set_strength(1.0)
