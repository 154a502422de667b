"""What chance decides about the objective: by counter, and from the distributions that are asked for (spec 3.2)."""

import math
from typing import Any

import pytest
import torch
from reverie_hidream.randomness import Draw
from reverie_hidream.training.draws import FAST_SIGMAS, SampleDraws, custom_sigmas, level_spacing
from reverie_hidream.training.objective import ObjectiveSettings, RolloutSettings

SHAPE = (2, 4, 4)
MANY = range(4000)


def _draws(*, seed: int = 7, samples_per_step: int = 1, **settings: Any) -> SampleDraws:
    return SampleDraws(seed=seed, settings=ObjectiveSettings(**settings), samples_per_step=samples_per_step)


def _sigmas(**settings: Any) -> torch.Tensor:
    """Many noise levels, double, sorted."""
    return _draws(**settings).draw(1, MANY, (1, 2, 2)).sigmas.double().sort().values


def _assert_distribution(sigmas: torch.Tensor, distribution: Any) -> None:
    """Kolmogorov and Smirnov: the largest distance of the distribution functions, at far beyond one in 10,000."""
    found = (torch.arange(len(sigmas), dtype=torch.float64) + 0.5) / len(sigmas)
    assert float((distribution(sigmas) - found).abs().max()) < 2.2 / math.sqrt(len(sigmas))


def test_a_draw_is_a_function_of_seed_step_and_position() -> None:
    settings: dict[str, Any] = {"input_perturbation": 0.1, "offset_noise": 0.1, "masked_loss_probability": 0.5}
    whole = _draws(**settings).draw(3, [0, 1, 2], SHAPE)
    part = _draws(**settings).draw(3, [2], SHAPE)
    assert torch.equal(whole.noise[2:], part.noise)
    assert torch.equal(whole.sigmas[2:], part.sigmas)
    assert whole.perturbation is not None
    assert part.perturbation is not None
    assert torch.equal(whole.perturbation[2:], part.perturbation)
    assert whole.uses_mask[2:] == part.uses_mask


@pytest.mark.parametrize("mode", ["sigmoid", "uniform", "beta", "fast", "custom", "mixflow"])
def test_every_mode_draws_by_counter(mode: str) -> None:
    draws = _draws(timestep_sampling=mode, flow_custom_timesteps=(0.1, 0.5, 0.9))
    many = [draws.draw(step, [0], SHAPE).sigmas.item() for step in range(1, 40)]
    assert many == [draws.draw(step, [0], SHAPE).sigmas.item() for step in range(1, 40)]
    assert len(set(many)) > 2
    assert all(0.0 <= sigma <= 1.0 for sigma in many)


def test_sigmoid_takes_the_offset_before_the_scale() -> None:
    draws = _draws(flow_sigmoid_scale=0.5)
    normal = float(Draw(seed=7, stream="timestep").normal(4, 2, (1,))[0])
    base = 1 / (1 + math.exp(-0.5 * (normal + 0.7)))
    found = draws.draw(4, [2], SHAPE, timestep_offset=0.7).sigmas
    assert found.tolist() == pytest.approx([3 * base / (1 + 2 * base)], rel=1e-6)
    assert found.dtype == torch.float32


def test_sigmoid_is_the_logistic_of_a_normal() -> None:
    sigmas = _sigmas(flow_schedule_shift=1.0)
    _assert_distribution(sigmas, lambda s: torch.special.ndtr(torch.logit(s)))


def test_uniform_is_uniform_before_the_shift() -> None:
    _assert_distribution(_sigmas(timestep_sampling="uniform", flow_schedule_shift=1.0), lambda s: s)
    _assert_distribution(_sigmas(timestep_sampling="uniform", flow_schedule_shift=3.0), lambda s: s / (3 - 2 * s))


def test_beta_has_its_two_parameters() -> None:
    # Closed forms of the regularised incomplete beta function.
    _assert_distribution(
        _sigmas(timestep_sampling="beta", flow_schedule_shift=1.0), lambda s: 3 * s.square() - 2 * s.pow(3)
    )
    other = _sigmas(
        timestep_sampling="beta",
        flow_schedule_shift=1.0,
        flow_beta_schedule_alpha=3.0,
        flow_beta_schedule_beta=1.0,
    )
    _assert_distribution(other, lambda s: s.pow(3))


def test_fast_takes_four_levels_without_a_shift() -> None:
    sigmas = _sigmas(timestep_sampling="fast")
    shares = {value: float((sigmas == value).double().mean()) for value in (1.0, 0.75, 0.5, 0.25)}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert [shares[1.0], shares[0.75], shares[0.5], shares[0.25]] == pytest.approx([0.7, 0.1, 0.1, 0.1], abs=0.03)
    assert len(FAST_SIGMAS) == 10


def test_custom_takes_values_without_a_shift() -> None:
    sigmas = _sigmas(timestep_sampling="custom", flow_custom_timesteps=(100, 500, 900))
    assert set(sigmas.tolist()) == set(torch.tensor([0.1, 0.5, 0.9]).double().tolist())
    assert [float((sigmas == sigmas[index]).double().mean()) for index in (0, -1)] == pytest.approx(
        [1 / 3] * 2, abs=0.04
    )


def test_round_robin_counts_samples_over_steps() -> None:
    draws = _draws(
        timestep_sampling="custom",
        flow_timesteps_mode="round-robin",
        flow_custom_timesteps=(0.25, 0.5, 0.75),
        samples_per_step=2,
    )
    taken = [draws.draw(step, [0, 1], SHAPE).sigmas.tolist() for step in (1, 2, 3)]
    assert taken == [[0.25, 0.5], [0.75, 0.25], [0.5, 0.75]]


@pytest.mark.parametrize(
    ("values", "expected"), [((0.0, 1.0), (0.0, 1.0)), ((1.0, 500.0), (0.001, 0.5)), ((1000.0,), (1.0,))]
)
def test_a_list_is_of_sigmas_only_if_all_of_it_is(values: tuple[float, ...], expected: tuple[float, ...]) -> None:
    assert custom_sigmas(values) == expected


@pytest.mark.parametrize("values", [(), (-0.1,), (1000.5,)])
def test_refuses_a_list_that_means_nothing(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="flow_custom_timesteps"):
        custom_sigmas(values)


def test_mixflow_slows_the_input_and_not_the_timestep() -> None:
    drawn = _draws(timestep_sampling="mixflow", mixflow_gamma=0.8, flow_schedule_shift=1.0).draw(1, MANY, (1, 2, 2))
    # 1 - sqrt(U) has the distribution function 1 - (1 - s)^2.
    _assert_distribution(drawn.sigmas.double().sort().values, lambda s: 1 - (1 - s).square())
    assert drawn.input_sigmas is not None
    slowed = ((drawn.input_sigmas - drawn.sigmas) / (0.8 * (1 - drawn.sigmas))).double()
    _assert_distribution(slowed.sort().values, lambda u: u)
    assert abs(float(torch.corrcoef(torch.stack([slowed, drawn.sigmas.double()]))[0, 1])) < 0.06


@pytest.mark.parametrize(
    ("size", "shift"), [((64, 64), 1.878), ((96, 96), 2.332), ((128, 128), 3.158), ((80, 56), 1.908)]
)
def test_the_automatic_shift_follows_the_true_size(size: tuple[int, int], shift: float) -> None:
    # 640 x 448 pixels are 40 x 28 = 1120 patches, not the 4096 that they are padded to.
    settings = ObjectiveSettings(flow_schedule_auto_shift=True)
    assert settings.shift_for(*size) == pytest.approx(shift, abs=5e-4)
    base = _draws(flow_schedule_shift=1.0).draw(1, [0], (1, *size)).sigmas.double()
    expected = shift * base / (1 + (shift - 1) * base)
    found = SampleDraws(seed=7, settings=settings).draw(1, [0], (1, *size)).sigmas.double()
    assert found.tolist() == pytest.approx(expected.tolist(), abs=2e-4)


def test_offset_noise_moves_whole_channels_and_is_part_of_the_noise() -> None:
    plain = _draws().draw(2, [0, 1], (3, 8, 8)).noise
    moved = _draws(offset_noise=0.25).draw(2, [0, 1], (3, 8, 8)).noise
    offsets = moved - plain
    assert torch.allclose(offsets, offsets[..., :1, :1].expand_as(offsets), atol=1e-6)
    expected = [0.25 * float(value) for value in Draw(seed=7, stream="offset").normal(2, 1, (3, 1, 1)).ravel()]
    assert offsets[1, :, 0, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_input_perturbation_falls_to_nothing() -> None:
    draws = _draws(input_perturbation=0.4, input_perturbation_steps=4)
    strengths = []
    for step in range(1, 7):
        found = draws.draw(step, [0], SHAPE).perturbation
        normal = torch.from_numpy(Draw(seed=7, stream="perturbation").normal(step, 0, SHAPE))
        strengths.append(0.0 if found is None else float((found[0] / normal).mean()))
    assert strengths == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0, 0.0], rel=1e-6)
    assert torch.equal(draws.draw(1, [0], SHAPE).noise, _draws().draw(1, [0], SHAPE).noise)


def test_input_perturbation_stays_without_an_end() -> None:
    found = _draws(input_perturbation=0.4).draw(10_000, [0], SHAPE).perturbation
    normal = torch.from_numpy(Draw(seed=7, stream="perturbation").normal(10_000, 0, SHAPE))
    assert found is not None
    assert torch.allclose(found[0], 0.4 * normal)


def test_masks_apply_at_the_rate_asked_for() -> None:
    used = _draws(masked_loss_probability=0.25).draw(1, MANY, (1, 2, 2)).uses_mask
    assert sum(used) / len(used) == pytest.approx(0.25, abs=0.03)
    assert _draws().draw(1, [0, 1], SHAPE).uses_mask == ()


def _offsets(**settings: Any) -> list[int]:
    rollout = RolloutSettings(max_step_offset=5, **settings)
    # Every sample at half the noise, far enough from pure noise for all offsets.
    draws = _draws(timestep_sampling="custom", flow_custom_timesteps=(0.5,), rollout=rollout)
    return list(draws.draw(1, MANY, (1, 2, 2)).rollout_offsets)


def test_samples_are_rolled_out_at_the_rate_asked_for() -> None:
    offsets = _offsets(probability=0.3)
    assert sum(offset > 0 for offset in offsets) / len(offsets) == pytest.approx(0.3, abs=0.03)
    assert _offsets(probability=0.0) == [0] * len(MANY)
    assert _draws().draw(1, [0], SHAPE).rollout_offsets == ()


@pytest.mark.parametrize("strategy", ["uniform", "biased_early", "biased_late"])
def test_strategies_draw_their_lengths(strategy: str) -> None:
    offsets = _offsets(probability=1.0, strategy=strategy)
    shares = [offsets.count(length) / len(offsets) for length in range(1, 6)]
    # Of 1 + round(4 u^2), in closed form.
    early = [math.sqrt((k + 0.5) / 4) - math.sqrt(max(0.0, k - 0.5) / 4) for k in range(4)] + [1 - math.sqrt(3.5 / 4)]
    wanted = {"uniform": [0.2] * 5, "biased_early": early, "biased_late": early[::-1]}[strategy]
    assert shares == pytest.approx(wanted, abs=0.04)


def test_close_to_pure_noise_there_are_fewer_steps_to_come_from() -> None:
    spacing = level_spacing(30)
    base = 1 - 1.5 * spacing
    sigma = 3 * base / (1 + 2 * base)
    rollout = RolloutSettings(max_step_offset=9, probability=1.0, strategy="uniform")
    draws = _draws(timestep_sampling="custom", flow_custom_timesteps=(sigma,), rollout=rollout)
    assert set(draws.draw(1, range(200), SHAPE).rollout_offsets) == {1, 2}
    noise = _draws(timestep_sampling="custom", flow_custom_timesteps=(1.0,), rollout=rollout)
    assert set(noise.draw(1, range(50), SHAPE).rollout_offsets) == {0}
