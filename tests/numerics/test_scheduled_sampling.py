"""Roll-outs of a whole step, against plain float64 loops over diffusers' module (spec 9)."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from reverie_hidream.training.batch import Batch, BatchDraws
from reverie_hidream.training.objective import ReflexflowSettings, RolloutSettings
from reverie_hidream.training.rollout import rollout_levels

Make = Callable[..., Any]
Error = Callable[[torch.Tensor, torch.Tensor], float]

SIZE = (8, 12)
SHIFT, NUM_STEPS = 3.0, 10
OFFSETS = (0, 2, 1)


@pytest.fixture
def made(make_batch: Make) -> Any:
    """Three samples in float64, at levels 0.9, 0.55 and 0.2."""
    return make_batch(*SIZE, batch_size=3)


def _batch(made: Any, offsets: tuple[int, ...] = OFFSETS, **fields: Any) -> Batch:
    draws = BatchDraws(noise=made.noise, sigmas=made.sigmas, rollout_offsets=offsets)
    return Batch(latents=made.latents, draws=draws, conditioning=made.text, **fields)


def _settings(**fields: Any) -> RolloutSettings:
    return RolloutSettings(**{"max_step_offset": 2, "num_inference_steps": NUM_STEPS, **fields})


def _level_above(sigma: float, steps: int) -> float:
    """The level so many steps of the inference schedule above one, in plain numbers."""
    unshifted = sigma / (SHIFT - (SHIFT - 1) * sigma) + steps * 0.999 / (NUM_STEPS - 1)
    unshifted = min(1.0, unshifted)
    return SHIFT * unshifted / (1 + (SHIFT - 1) * unshifted)


def _expected_inputs(reference: Any, made: Any, sampler: str) -> torch.Tensor:
    """Sample by sample, step by step."""
    rows = []
    for index, offset in enumerate(OFFSETS):
        text = made.text.select([index])
        own = float(made.sigmas[index])
        levels = [*(_level_above(own, steps) for steps in range(offset, 0, -1)), own]
        x = (1 - levels[0]) * made.latents[index : index + 1] + levels[0] * made.noise[index : index + 1]
        for begin, end in pairwise(levels):
            slope = _velocity(reference, x, begin, text)
            if sampler == "heun":
                slope = (slope + _velocity(reference, x + (end - begin) * slope, end, text)) / 2
            x = x + (end - begin) * slope
        rows.append(x)
    return torch.cat(rows)


@torch.no_grad()
def _velocity(reference: Any, x: torch.Tensor, sigma: float, text: Any) -> torch.Tensor:
    velocity: torch.Tensor = reference.velocity(x, torch.tensor([sigma], dtype=torch.float64), text)
    return velocity


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_the_input_is_drawn_by_the_model_and_the_target_stays(
    make_trainee: Make, make_training_reference: Make, made: Any, relative_error: Error, sampler: str
) -> None:
    reference = make_training_reference()
    noisy = _expected_inputs(reference, made, sampler)
    loss = (reference.velocity(noisy, made.sigmas, made.text) - (made.noise - made.latents)).square().mean()
    trainee = make_trainee(rollout=_settings(sampler=sampler))
    result = trainee.step.train_step(1, [_batch(made)])
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert relative_error(trainee.gradient(), reference.gradient(loss)) < 1e-6
    assert result.rollout_share == pytest.approx(2 / 3)


def test_the_solvers_differ(make_training_reference: Make, made: Any, relative_error: Error) -> None:
    reference = make_training_reference()
    euler, heun = (_expected_inputs(reference, made, sampler) for sampler in ("euler", "heun"))
    assert relative_error(euler[1:], heun[1:]) > 1e-3
    assert torch.equal(euler[0], heun[0])


def test_a_sample_that_is_not_rolled_out_is_trained_as_always(
    make_trainee: Make, make_batch: Make, relative_error: Error
) -> None:
    made = make_batch(*SIZE, batch_size=3)
    rolled, plain = make_trainee(rollout=_settings()), make_trainee()
    first = rolled.step.train_step(1, [_batch(made, (0, 0, 0))])
    second = plain.step.train_step(1, [_batch(made, ())])
    assert first.loss == second.loss
    assert torch.equal(rolled.gradient(), plain.gradient())
    assert (first.rollout_share, second.rollout_share) == (0.0, None)


def test_reflexflow_counts_for_rolled_out_samples_alone(
    make_trainee: Make, make_training_reference: Make, made: Any, relative_error: Error
) -> None:
    reference = make_training_reference()
    noisy = _expected_inputs(reference, made, "euler")
    level = made.sigmas.view(-1, 1, 1, 1)
    plain = (1 - level) * made.latents + level * made.noise
    with torch.no_grad():
        clean = reference.velocity(plain, made.sigmas, made.text)
    velocity, target = reference.velocity(noisy, made.sigmas, made.text), made.noise - made.latents
    losses = []
    for index, offset in enumerate(OFFSETS):
        v, square = velocity[index].flatten(), (velocity[index] - target[index]).square().flatten()
        if not offset:
            losses.append(square.mean())
            continue
        bias = (clean[index].flatten() - v.detach()).abs()
        d = (noisy[index] - made.latents[index]).flatten()
        cosine = (v @ d) / (v.norm() * d.norm())
        losses.append(3.0 * ((1 + 0.5 * bias / bias.mean()) * square).mean() + 2.0 * 2 * (1 - cosine))
    loss = torch.stack(losses).mean()
    trainee = make_trainee(rollout=_settings(reflexflow=ReflexflowSettings(alpha=0.5, beta1=2.0, beta2=3.0)))
    result = trainee.step.train_step(1, [_batch(made)])
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert relative_error(trainee.gradient(), reference.gradient(loss)) < 1e-6


def test_reflexflow_keeps_to_the_mask_and_the_loss_of_the_job(
    make_trainee: Make, make_training_reference: Make, made: Any, relative_error: Error
) -> None:
    """What the mask hides teaches a rolled-out sample as little as any other."""
    reference = make_training_reference()
    noisy = _expected_inputs(reference, made, "euler")
    level = made.sigmas.view(-1, 1, 1, 1)
    with torch.no_grad():
        clean = reference.velocity((1 - level) * made.latents + level * made.noise, made.sigmas, made.text)
    velocity, target = reference.velocity(noisy, made.sigmas, made.text), made.noise - made.latents
    masks = torch.zeros(3, 1, *SIZE, dtype=torch.float64)
    masks[:, :, 2:7, 3:8] = 1.0
    losses = []
    for index, offset in enumerate(OFFSETS):
        seen = (slice(None), slice(2, 7), slice(3, 8))
        v, d = velocity[index], noisy[index] - made.latents[index]
        bend = 2 * (((v - target[index]).square() + 0.2**2).sqrt() - 0.2)
        bias = (clean[index] - v.detach()).abs()
        emphasis = 1 + 0.5 * bias / bias.mean() if offset else torch.ones_like(bias)
        cosine = torch.cosine_similarity(v[seen].flatten(), d[seen].flatten(), dim=0)
        plain = (emphasis * bend)[seen].mean()
        losses.append(3.0 * plain + 2.0 * 2 * (1 - cosine) if offset else plain)
    loss = torch.stack(losses).mean()
    rollout = _settings(reflexflow=ReflexflowSettings(alpha=0.5, beta1=2.0, beta2=3.0))
    huber: dict[str, Any] = {"loss_type": "smooth_l1", "huber_c": 0.2, "huber_schedule": "constant"}
    trainee = make_trainee(rollout=rollout, masked_loss_normalise_area=True, **huber)
    result = trainee.step.train_step(1, [_batch(made, masks=masks)])
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert relative_error(trainee.gradient(), reference.gradient(loss)) < 1e-6


def test_reflexflow_changes_nothing_where_nothing_is_rolled_out(make_trainee: Make, made: Any) -> None:
    asked = make_trainee(rollout=_settings(reflexflow=ReflexflowSettings()))
    plain = make_trainee()
    losses = [trainee.step.train_step(1, [_batch(made, (0, 0, 0))]).loss for trainee in (asked, plain)]
    assert losses[0] == losses[1]
    assert torch.equal(asked.gradient(), plain.gradient())


def test_regularisation_samples_are_never_rolled_out(make_trainee: Make, made: Any) -> None:
    rolled, plain = make_trainee(rollout=_settings()), make_trainee()
    result = rolled.step.train_step(1, [_batch(made, is_regularisation=True)])
    plain.step.train_step(1, [_batch(made, (), is_regularisation=True)])
    assert torch.equal(rolled.gradient(), plain.gradient())
    assert result.rollout_share == 0.0


def test_the_way_down_ends_at_the_sample_s_own_level_to_the_last_bit() -> None:
    sigmas = torch.tensor([0.1234567, 0.87654321])
    levels = rollout_levels(sigmas, (2, 3), shift=3.158, num_inference_steps=30)
    assert torch.equal(levels[0], sigmas)
    assert bool((levels[1:] > levels[:-1]).all())


def test_steps_are_those_of_the_inference_schedule() -> None:
    """diffusers' scheduler with the same shift and number of steps has exactly these levels."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(30)
    unshifted = scheduler.sigmas[:-1].double()
    schedule = 3.0 * unshifted / (1 + 2.0 * unshifted)
    levels = rollout_levels(schedule[7:8].float(), (5,), shift=3.0, num_inference_steps=30)
    assert levels[:, 0].tolist() == pytest.approx(schedule[2:8].flip(0).tolist(), abs=1e-6)
