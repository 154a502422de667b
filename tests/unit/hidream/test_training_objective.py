"""Losses, weights and ramps of the objective, against the formulas in plain Python (spec 3.4, 3.6, 9)."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from reverie_hidream.flow import schedule_sigmas, shift_sigma, unshift_sigma
from reverie_hidream.training.objective import (
    ObjectiveSettings,
    ReflexflowSettings,
    RolloutSettings,
    huber_threshold,
    mask_weights,
    mean_losses,
    perturbation_strength,
    pixel_losses,
    reflexflow_losses,
    rollout_probability,
)

SIGMAS = (0.05, 0.4, 0.95)


def _pair() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    shape = (3, 2, 2, 3)
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]  # two of them


def _threshold(schedule: str, c: float, sigma: float) -> float:
    if schedule == "constant":
        return c
    if schedule == "exponential":
        return math.exp(math.log(c) * 1000 * sigma / 1000)
    q = math.sqrt((1 - sigma) / (sigma + 1e-4))
    return (1 - c) / (1 + q) ** 2 + c


@pytest.mark.parametrize("schedule", ["snr", "exponential", "constant"])
@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1", "l2"])
def test_losses_are_those_of_the_formulas(schedule: str, loss_type: str) -> None:
    prediction, target = _pair()
    settings = ObjectiveSettings(loss_type=loss_type, huber_c=0.2, huber_schedule=schedule)
    found = pixel_losses(prediction, target, torch.tensor(SIGMAS, dtype=torch.float64), settings)
    for place in product(range(3), range(2), range(2), range(3)):
        c = _threshold(schedule, 0.2, SIGMAS[place[0]])
        d = float(prediction[place]) - float(target[place])
        bend = math.sqrt(d * d + c * c) - c
        expected = {"l2": d * d, "huber": 2 * c * bend, "smooth_l1": 2 * bend}[loss_type]
        assert float(found[place]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_the_threshold_is_finite_at_both_ends(sigma: float) -> None:
    assert 0.1 <= huber_threshold(torch.tensor([sigma]), ObjectiveSettings()).item() <= 1.0


def test_a_small_difference_keeps_its_digits_in_float32() -> None:
    loss = pixel_losses(
        torch.full((1, 1, 1, 1), 1e-4),
        torch.zeros(1, 1, 1, 1),
        torch.tensor([0.5]),
        ObjectiveSettings(loss_type="huber", huber_schedule="constant", huber_c=1.0),
    )
    assert loss.item() == pytest.approx(1e-8, rel=1e-5)


@pytest.mark.parametrize("settings", [{"loss_type": "l3"}, {"loss_type": "huber", "huber_schedule": "none"}])
def test_refuses_an_unknown_loss(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="unknown"):
        pixel_losses(*_pair(), torch.ones(3), ObjectiveSettings(**settings))


def _masks() -> torch.Tensor:
    masks = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.0, 0.0]], dtype=torch.float64).expand(3, 1, 2, 3).clone()
    masks[2] = 0.0
    return masks


@pytest.mark.parametrize("by_area", [False, True])
@pytest.mark.parametrize("mask_type", ["mask", "segmentation"])
def test_a_masked_loss_is_that_of_a_plain_loop(mask_type: str, by_area: bool) -> None:
    losses, masks = _pair()[0].square(), _masks()
    found = mean_losses(losses, mask_weights(masks, mask_type, ()), by_area=by_area)
    for sample in range(3):
        total = area = 0.0
        for channel, row, column in product(range(2), range(2), range(3)):
            mask = float(masks[sample, 0, row, column])
            weight = float(mask > 0) if mask_type == "segmentation" else mask
            total += weight * float(losses[sample, channel, row, column])
            area += weight
        divisor = (area or 1.0) if by_area else 12.0
        assert float(found[sample]) == pytest.approx(total / divisor, rel=1e-12)


def test_a_small_mask_trains_as_strongly_by_area() -> None:
    losses = torch.ones(2, 4, 8, 8)
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, 0, 0, 0] = 1.0
    masks[1] = 1.0
    assert mean_losses(losses, masks).tolist() == pytest.approx([1 / 64, 1.0])
    assert mean_losses(losses, masks, by_area=True).tolist() == pytest.approx([1.0, 1.0])


def test_a_segmentation_that_does_not_apply_weighs_every_pixel_alike() -> None:
    weights = mask_weights(_masks(), "segmentation", (True, False, True))
    assert torch.equal(weights[0], (_masks()[0] > 0).double())
    assert torch.equal(weights[1], torch.ones(1, 2, 3, dtype=torch.float64))


def test_a_mask_by_brightness_always_applies() -> None:
    assert torch.equal(mask_weights(_masks(), "mask", (True, False, True)), _masks())


def test_reflexflow_is_that_of_a_plain_loop() -> None:
    prediction, target = _pair()
    clean, displacement = (tensor.flip(0) * 0.7 for tensor in _pair())
    settings = ReflexflowSettings(alpha=0.5, beta1=2.0, beta2=3.0)
    losses = (prediction - target).square()
    found = reflexflow_losses(prediction, losses, clean_prediction=clean, displacement=displacement, settings=settings)
    for sample in range(3):
        p, t, c, d = (tensor[sample].flatten().tolist() for tensor in (prediction, target, clean, displacement))
        mean_bias = sum(abs(x - y) for x, y in zip(c, p, strict=True)) / len(p)
        velocity = sum((1 + 0.5 * abs(c[i] - p[i]) / mean_bias) * (p[i] - t[i]) ** 2 for i in range(len(p))) / len(p)
        cosine = sum(x * y for x, y in zip(p, d, strict=True)) / (math.hypot(*p) * math.hypot(*d))
        assert float(found[sample]) == pytest.approx(3 * velocity + 2 * 2 * (1 - cosine), rel=1e-10)


def test_reflexflow_without_a_bias_or_a_direction_is_the_plain_loss() -> None:
    prediction, target = _pair()
    settings = ReflexflowSettings(alpha=1.0, beta1=0.0, beta2=1.0)
    losses = (prediction - target).square()
    found = reflexflow_losses(prediction, losses, clean_prediction=prediction, displacement=target, settings=settings)
    assert found.tolist() == pytest.approx(losses.flatten(1).mean(1).tolist())


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("linear", [0.1, 0.1, 0.2, 0.3, 0.5, 0.5]), ("cosine", [0.1, 0.1, 0.1585786, 0.3, 0.5, 0.5])],
)
def test_the_probability_follows_its_ramp(shape: str, expected: list[float]) -> None:
    settings = RolloutSettings(
        max_step_offset=1,
        probability=0.9,
        prob_start=0.1,
        prob_end=0.5,
        ramp_steps=100,
        start_step=50,
        ramp_shape=shape,
    )
    found = [rollout_probability(step, settings) for step in (1, 50, 75, 100, 150, 999)]
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_probability_is_constant_without_a_ramp() -> None:
    settings = RolloutSettings(max_step_offset=1, probability=0.9, prob_start=0.1, start_step=50)
    assert {rollout_probability(step, settings) for step in (1, 1000)} == {0.9}


def test_perturbation_without_steps_stays() -> None:
    assert perturbation_strength(10**6, ObjectiveSettings(input_perturbation=0.1)) == 0.1


def test_the_shift_is_undone() -> None:
    levels = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.allclose(unshift_sigma(shift_sigma(levels, 3.158), 3.158), levels, atol=1e-14)


def test_the_schedule_has_the_known_timesteps() -> None:
    timesteps = (1000 * schedule_sigmas(28, 3.0)).tolist()
    assert timesteps[:4] == pytest.approx([1000, 987.35, 974.05, 960.04], abs=5e-3)
    assert timesteps[-4:] == pytest.approx([274.51, 195.65, 105.95, 2.99], abs=6e-3)
    assert schedule_sigmas(28, 3.0).dtype == torch.float32
