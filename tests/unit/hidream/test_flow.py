"""Noise levels, noisy latents, target and loss."""

import math

import pytest
import torch
from reverie_hidream.flow import (
    automatic_mu,
    automatic_shift,
    noisy_latents,
    sample_losses,
    sample_sigmas,
    shift_sigma,
    timesteps_of,
    velocity_target,
)


def test_shift_of_three_moves_one_half_to_three_quarters() -> None:
    assert shift_sigma(torch.tensor([0.0, 0.5, 1.0]), 3.0).tolist() == [0.0, 0.75, 1.0]


def test_shift_of_one_changes_nothing() -> None:
    sigmas = torch.linspace(0, 1, 11)

    assert torch.equal(shift_sigma(sigmas, 1.0), sigmas)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_refuses_a_shift_that_is_no_positive_number(shift: float) -> None:
    with pytest.raises(ValueError, match="flow schedule shift"):
        shift_sigma(torch.tensor([0.5]), shift)


@pytest.mark.parametrize(("pixels", "expected"), [(512, 1.878), (768, 2.332), (1024, 3.158)])
def test_automatic_shift_follows_the_size(pixels: int, expected: float) -> None:
    assert automatic_shift(pixels // 8, pixels // 8) == pytest.approx(expected, abs=5e-4)


def test_automatic_mu_meets_its_two_ends() -> None:
    assert automatic_mu(256) == 0.5
    assert automatic_mu(4096) == pytest.approx(1.15)


def test_sampled_sigmas_are_the_shifted_sigmoid_of_the_draws() -> None:
    draws = torch.tensor([-1.0, 0.0, 2.0])

    sigmas = sample_sigmas(draws, shift=3.0, sigmoid_scale=0.5)

    expected = [3 * s / (1 + 2 * s) for s in (1 / (1 + math.exp(-0.5 * draw)) for draw in (-1.0, 0.0, 2.0))]
    assert sigmas.tolist() == pytest.approx(expected, rel=1e-6)


def test_sampled_sigmas_stay_inside_the_schedule() -> None:
    sigmas = sample_sigmas(torch.randn(10_000, generator=torch.Generator().manual_seed(0)))

    assert 0.0 < sigmas.min() < sigmas.max() < 1.0
    # Half of all draws are negative, and sigmoid(0) shifted by 3 is 0.75.
    assert sigmas.median().item() == pytest.approx(0.75, abs=0.02)


def test_timesteps_are_not_rounded() -> None:
    assert timesteps_of(torch.tensor([0.12345])).item() == pytest.approx(123.45)


def test_noisy_latents_run_from_the_picture_to_the_noise() -> None:
    latents, noise = torch.full((3, 1, 2, 2), 2.0), torch.full((3, 1, 2, 2), -4.0)

    mixed = noisy_latents(latents, noise, torch.tensor([0.0, 0.25, 1.0]))

    assert mixed[:, 0, 0, 0].tolist() == [2.0, 0.5, -4.0]


def test_bfloat16_latents_are_mixed_in_float32() -> None:
    latents = torch.full((1, 1, 1, 1), 1.0, dtype=torch.bfloat16)

    mixed = noisy_latents(latents, torch.zeros_like(latents), torch.tensor([0.001]))

    assert mixed.dtype == torch.float32
    assert mixed.item() == pytest.approx(0.999, abs=1e-6)


def test_the_target_is_noise_minus_latents() -> None:
    assert velocity_target(torch.tensor([2.0]), torch.tensor([5.0])).item() == 3.0


def test_the_exact_velocity_has_no_loss() -> None:
    latents, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)

    assert sample_losses(noise - latents, velocity_target(latents, noise)).tolist() == [0.0, 0.0]


def test_following_the_velocity_from_noise_arrives_at_the_picture() -> None:
    latents, noise = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    start = noisy_latents(latents, noise, torch.tensor([1.0]))

    arrived = start - 1.0 * velocity_target(latents, noise)

    assert torch.allclose(arrived, latents, atol=1e-6)


def test_the_loss_of_a_sample_is_the_mean_over_its_pixels() -> None:
    prediction = torch.stack([torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 3.0)])

    assert sample_losses(prediction, torch.zeros_like(prediction)).tolist() == [1.0, 9.0]


def test_the_loss_of_a_bfloat16_prediction_is_float32() -> None:
    assert sample_losses(torch.zeros(1, 2, dtype=torch.bfloat16), torch.ones(1, 2)).dtype == torch.float32
