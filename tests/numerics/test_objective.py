"""Losses, masks, perturbation and regularisation of a whole step, against float64 loops over diffusers' module."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reverie_hidream.adapters import LokrConfig, attach_lokr
from reverie_hidream.adapters.full_rank import attach_full_rank
from reverie_hidream.optimizers import UpdateSettings, build_update
from reverie_hidream.training.batch import Batch, BatchDraws
from reverie_hidream.training.step import StepSettings, TrainingStep
from reverie_hidream.transformer import load_transformer, predict_velocity

Make = Callable[..., Any]
Error = Callable[[torch.Tensor, torch.Tensor], float]

SIZE = (8, 12)


@pytest.fixture
def made(make_batch: Make) -> Any:
    """Two samples in float64."""
    return make_batch(*SIZE, batch_size=2)


def _batch(made: Any, *, draws: dict[str, Any] | None = None, **fields: Any) -> Batch:
    chance = BatchDraws(**{"noise": made.noise, "sigmas": made.sigmas, **(draws or {})})
    return Batch(latents=made.latents, draws=chance, conditioning=made.text, **fields)


def _levels(sigmas: torch.Tensor) -> torch.Tensor:
    return sigmas.view(-1, 1, 1, 1)


def _expected_velocity(reference: Any, made: Any) -> torch.Tensor:
    noisy = (1 - _levels(made.sigmas)) * made.latents + _levels(made.sigmas) * made.noise
    velocity: torch.Tensor = reference.velocity(noisy, made.sigmas, made.text)
    return velocity


def _assert_same(trainee: Any, reference: Any, batch: Batch, loss: torch.Tensor, relative_error: Error) -> Any:
    result = trainee.step.train_step(1, [batch])
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    # Both compute rotary embeddings in float32, in another order (spec 1.5).
    assert relative_error(trainee.gradient(), reference.gradient(loss)) < 1e-7
    return result


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plain_loss(
    make_trainee: Make, make_training_reference: Make, made: Any, relative_error: Error, checkpointing: bool
) -> None:
    reference = make_training_reference()
    loss = (_expected_velocity(reference, made) - (made.noise - made.latents)).square().mean()
    _assert_same(make_trainee(checkpointing=checkpointing), reference, _batch(made), loss, relative_error)


def test_the_huber_loss_has_a_threshold_for_each_sample(
    make_trainee: Make, make_training_reference: Make, made: Any, relative_error: Error
) -> None:
    reference = make_training_reference()
    difference = _expected_velocity(reference, made) - (made.noise - made.latents)
    q = ((1 - made.sigmas) / (made.sigmas + 1e-4)).sqrt()
    c = _levels((1 - 0.1) / (1 + q).square() + 0.1)
    loss = (2 * c * ((difference.square() + c.square()).sqrt() - c)).mean()
    _assert_same(make_trainee(loss_type="huber"), reference, _batch(made), loss, relative_error)


@pytest.mark.parametrize(("mask_type", "by_area"), [("mask", False), ("mask", True), ("segmentation", True)])
def test_a_mask_weighs_loss_and_gradient(
    make_trainee: Make,
    make_training_reference: Make,
    made: Any,
    relative_error: Error,
    mask_type: str,
    by_area: bool,
) -> None:
    reference = make_training_reference()
    masks = torch.rand(2, 1, *SIZE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    masks[masks < 0.5] = 0
    weights = (masks > 0).double() if mask_type == "segmentation" else masks
    if mask_type == "segmentation":
        # The second sample's is left out by chance.
        weights = torch.stack([weights[0], torch.ones_like(weights[1])])
    losses = (_expected_velocity(reference, made) - (made.noise - made.latents)).square() * weights
    divisor = (16 * weights.sum(dim=(1, 2, 3))) if by_area else torch.full((2,), 16.0 * SIZE[0] * SIZE[1])
    loss = (losses.sum(dim=(1, 2, 3)) / divisor).mean()
    batch = _batch(made, draws={"uses_mask": (True, False)}, masks=masks, mask_type=mask_type)
    trainee = make_trainee(masked_loss_normalise_area=by_area, masked_loss_probability=0.5)
    _assert_same(trainee, reference, batch, loss, relative_error)


def test_perturbation_reaches_the_input_and_not_the_target(
    make_trainee: Make, make_training_reference: Make, made: Any, relative_error: Error
) -> None:
    reference = make_training_reference()
    extra = 0.1 * made.noise.flip(0)
    noisy = (1 - _levels(made.sigmas)) * made.latents + _levels(made.sigmas) * (made.noise + extra)
    loss = (reference.velocity(noisy, made.sigmas, made.text) - (made.noise - made.latents)).square().mean()
    _assert_same(make_trainee(), reference, _batch(made, draws={"perturbation": extra}), loss, relative_error)


def test_mixflow_tells_the_network_another_level_than_that_of_its_input(
    make_trainee: Make, make_training_reference: Make, made: Any, relative_error: Error
) -> None:
    reference = make_training_reference()
    slowed = made.sigmas + 0.4 * (1 - made.sigmas)
    noisy = (1 - _levels(slowed)) * made.latents + _levels(slowed) * made.noise
    loss = (reference.velocity(noisy, made.sigmas, made.text) - (made.noise - made.latents)).square().mean()
    _assert_same(make_trainee(), reference, _batch(made, draws={"input_sigmas": slowed}), loss, relative_error)


def test_regularisation_trains_towards_the_model_without_its_adapter(
    make_trainee: Make, make_training_reference: Make, made: Any, relative_error: Error
) -> None:
    reference = make_training_reference()
    reference.adapter.set_strength(0.0)
    parent = _expected_velocity(reference, made).detach()
    reference.adapter.set_strength(1.0)
    loss = (_expected_velocity(reference, made) - parent).square().mean()
    result = _assert_same(make_trainee(), reference, _batch(made, is_regularisation=True), loss, relative_error)
    assert result.regularisation_loss == pytest.approx(float(loss.detach()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_regularisation_loss_is_exactly_0_at_the_start(
    tiny_checkpoint: Path, made: Any, dtype: torch.dtype
) -> None:
    model = load_transformer(tiny_checkpoint, dtype=dtype)
    adapter = attach_lokr(model, LokrConfig(factor=4, multiplier=0.5), seed=1)
    update = build_update(adapter.parameters(), UpdateSettings(learning_rate=0.01))
    step = TrainingStep(
        model, adapter, update, StepSettings(gradient_accumulation_steps=2), learning_rate=lambda _: 0.01
    )
    batch = _batch(made, is_regularisation=True)
    first = step.train_step(1, [batch, batch])
    assert (first.loss, first.regularisation_loss, first.gradient_norm) == (0.0, 0.0, 0.0)
    mixed = step.train_step(2, [_batch(made), batch])
    assert mixed.regularisation_loss == 0.0
    assert mixed.loss > 0.1
    later = step.train_step(3, [_batch(made), batch])
    assert later.regularisation_loss is not None
    assert later.regularisation_loss > 0


def test_the_adapter_is_as_strong_as_configured_after_the_parent_s_turn(
    tiny_checkpoint: Path, make_batch: Make, made: Any
) -> None:
    model = load_transformer(tiny_checkpoint, dtype=torch.float32)
    adapter = attach_lokr(model, LokrConfig(factor=4, multiplier=0.5), seed=1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    before = predict_velocity(model, made.noise, 1000 * made.sigmas, made.text)
    update = build_update(adapter.parameters(), UpdateSettings(learning_rate=0.0, weight_decay=0.0))
    step = TrainingStep(model, adapter, update, StepSettings(), learning_rate=lambda _: 0.0)
    step.train_step(1, [_batch(made, is_regularisation=True)])
    assert torch.equal(predict_velocity(model, made.noise, 1000 * made.sigmas, made.text), before)

    # A latent that no model takes: the parent's pass fails, and the adapter is on again all the same.
    odd = make_batch(7, 12, batch_size=2)
    with pytest.raises(ValueError, match="latent size"):
        step.train_step(2, [_batch(odd, is_regularisation=True)])
    assert torch.equal(predict_velocity(model, made.noise, 1000 * made.sigmas, made.text), before)


def test_regularisation_keeps_the_weights_that_full_rank_tuning_trains(tiny_checkpoint: Path, made: Any) -> None:
    """The parent's turn writes over every weight, and brings them back before the pass that is trained."""
    model = load_transformer(tiny_checkpoint, dtype=torch.float32)
    adapter = attach_full_rank(model)
    update = build_update(adapter.parameters(), UpdateSettings(learning_rate=1e-3))
    step = TrainingStep(model, adapter, update, StepSettings(), learning_rate=lambda _: 1e-3)
    assert step.train_step(1, [_batch(made, is_regularisation=True)]).regularisation_loss == 0.0
    step.train_step(2, [_batch(made)])
    away = step.train_step(3, [_batch(made, is_regularisation=True)]).regularisation_loss
    for number in range(4, 12):
        back = step.train_step(number, [_batch(made, is_regularisation=True)]).regularisation_loss
    assert away is not None
    assert back is not None
    assert 0 < back < 0.5 * away


def test_a_step_reports_the_largest_gradient_element(make_trainee: Make, tiny_checkpoint: Path, made: Any) -> None:
    trainee = make_trainee()
    trainee.step.train_step(1, [_batch(made)])
    model = load_transformer(tiny_checkpoint, dtype=torch.float64)
    adapter = attach_lokr(model, LokrConfig(factor=4), dtype=torch.float64, seed=1)
    with torch.no_grad():
        for own, other in zip(adapter.parameters(), trainee.adapter.parameters(), strict=True):
            own.copy_(other)
    update = build_update(adapter.parameters(), UpdateSettings())
    step = TrainingStep(model, adapter, update, StepSettings(), learning_rate=lambda _: 0.0)
    result = step.train_step(1, [_batch(made)])
    assert result.gradient_absmax == pytest.approx(float(trainee.gradient().abs().max()), rel=1e-5)
    assert result.gradient_norm == pytest.approx(float(trainee.gradient().norm()), rel=1e-5)
