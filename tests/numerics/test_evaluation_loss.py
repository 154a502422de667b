"""The stable evaluation loss: the same digits twice, those of a plain loop, and no trace in training (spec 7.6)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reverie_hidream.adapters import LokrConfig, attach_lokr
from reverie_hidream.optimizers import UpdateSettings, build_update
from reverie_hidream.training.batch import Batch, BatchDraws
from reverie_hidream.training.evaluation import EvaluationBatch, evaluate, evaluation_noise
from reverie_hidream.training.objective import ObjectiveSettings
from reverie_hidream.training.step import StepSettings, TrainingStep
from reverie_hidream.transformer import load_transformer

Make = Callable[..., Any]

NUM_TIMESTEPS = 5


@pytest.fixture
def images(make_batch: Make) -> list[EvaluationBatch]:
    """Three images of two sizes."""
    return [_image(make_batch(8, 8, batch_size=1), "a"), _image(make_batch(8, 12, batch_size=2), "b")]


def _image(made: Any, name: str) -> EvaluationBatch:
    noise = torch.stack(
        [evaluation_noise(f"{name}{index}", made.latents.shape[1:]) for index in range(len(made.latents))]
    )
    return EvaluationBatch(latents=made.latents.float(), noise=noise, conditioning=made.text)


def _plain_loop(reference: Any, images: list[EvaluationBatch], shifts: list[float]) -> list[tuple[float, float]]:
    """(timestep, loss) for each image and timestep."""
    measured = []
    for image, shift in zip(images, shifts, strict=True):
        for step in range(NUM_TIMESTEPS):
            u = 1 + (0.001 - 1) * step / (NUM_TIMESTEPS - 1)
            sigma = shift * u / (1 + (shift - 1) * u)
            for index in range(len(image.latents)):
                x0, noise = image.latents[index : index + 1].double(), image.noise[index : index + 1].double()
                level = torch.tensor([sigma], dtype=torch.float64)
                with torch.no_grad():
                    text = image.conditioning.select([index])
                    velocity = reference.velocity((1 - sigma) * x0 + sigma * noise, level, text)
                measured.append((1000 * sigma, float((velocity - (noise - x0)).square().mean())))
    return measured


def test_equals_a_plain_loop_over_diffusers_module(
    make_trainee: Make, make_training_reference: Make, images: list[EvaluationBatch]
) -> None:
    found = make_trainee().step.evaluate(images, num_timesteps=NUM_TIMESTEPS)
    measured = _plain_loop(make_training_reference(), images, [3.0, 3.0])
    assert found.loss == pytest.approx(sum(loss for _, loss in measured) / len(measured), rel=1e-5)
    timesteps = [measured[step][0] for step in range(NUM_TIMESTEPS)]
    assert [point.timestep for point in found.timesteps] == pytest.approx(timesteps, rel=1e-6)
    for point, timestep in zip(found.timesteps, timesteps, strict=True):
        of_step = [loss for other, loss in measured if other == pytest.approx(timestep)]
        assert len(of_step) == 3
        assert point.loss == pytest.approx(sum(of_step) / 3, rel=1e-5)


def test_the_automatic_shift_is_that_of_each_size(
    make_trainee: Make, make_training_reference: Make, images: list[EvaluationBatch]
) -> None:
    trainee = make_trainee(flow_schedule_auto_shift=True, flow_schedule_shift=3.0)
    found = trainee.step.evaluate(images, num_timesteps=NUM_TIMESTEPS)
    # exp(0.5 + (tokens - 256) * 0.65 / 3840) for 16 and 24 tokens.
    shifts = [2.718281828459045 ** (0.5 + (tokens - 256) * 0.65 / 3840) for tokens in (16, 24)]
    measured = _plain_loop(make_training_reference(), images, shifts)
    assert found.loss == pytest.approx(sum(loss for _, loss in measured) / len(measured), rel=1e-5)
    # 1000 is common to both sizes, the others are not.
    assert len(found.timesteps) == 2 * NUM_TIMESTEPS - 1
    assert found.timesteps[0].timestep == 1000.0
    assert all(0 < point.timestep <= 1000 for point in found.timesteps)


def test_twice_gives_the_same_digits_and_moves_no_random_state(
    make_trainee: Make, images: list[EvaluationBatch]
) -> None:
    trainee = make_trainee()
    state = torch.get_rng_state()
    first = trainee.step.evaluate(images, num_timesteps=NUM_TIMESTEPS)
    torch.rand(3)
    assert trainee.step.evaluate(images, num_timesteps=NUM_TIMESTEPS) == first
    torch.set_rng_state(state)
    trainee.step.evaluate(images, num_timesteps=NUM_TIMESTEPS)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_neither_notices_nor_disturbs_it(
    tiny_checkpoint: Path, make_batch: Make, images: list[EvaluationBatch]
) -> None:
    """With dropout, which is off while it is measured and goes on afterwards as if nothing had been."""
    made = make_batch(8, 8, dtype=torch.float32)
    draws = BatchDraws(noise=made.noise, sigmas=made.sigmas)
    batch = Batch(latents=made.latents, draws=draws, conditioning=made.text)
    ends, measured = [], []
    for is_evaluated in (False, True):
        model = load_transformer(tiny_checkpoint, dtype=torch.float32)
        adapter = attach_lokr(model, LokrConfig(factor=4, rank_dropout=0.5), seed=1)
        update = build_update(adapter.parameters(), UpdateSettings(learning_rate=0.01))
        step = TrainingStep(model, adapter, update, StepSettings(), learning_rate=lambda _: 0.01)
        for number in (1, 2, 3):
            step.train_step(number, [batch])
            if is_evaluated:
                step.evaluate(images, num_timesteps=2)
        measured.append(step.evaluate(images, num_timesteps=2))
        ends.append(adapter.raw_state())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert measured[0] == measured[1]


def test_the_noise_is_that_of_the_image() -> None:
    first = evaluation_noise("ab" * 32, (2, 3, 4))
    assert torch.equal(first, evaluation_noise("ab" * 32, (2, 3, 4)))
    assert not torch.equal(first, evaluation_noise("cd" * 32, (2, 3, 4)))


def test_says_how_far_it_is(tiny_checkpoint: Path, images: list[EvaluationBatch]) -> None:
    done: list[int] = []
    model = load_transformer(tiny_checkpoint, dtype=torch.float32)
    evaluate(model, images, ObjectiveSettings(), num_timesteps=2, on_progress=done.append)
    assert done == [1, 2, 3, 4]


def test_refuses_to_measure_nothing(make_trainee: Make) -> None:
    with pytest.raises(ValueError, match="no batch"):
        make_trainee().step.evaluate([])
