"""Guidance rescale, schedulers by name, previews and compiling, each against another way to compute it."""

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from reverie_hidream.compilation import CompiledPrediction
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.sampling import (
    PreviewHook,
    StepPreview,
    draw,
    initial_noise,
    named_scheduler,
    rescale_guidance,
)
from reverie_hidream.transformer import predict_velocity

MakeTransformer = Callable[..., diffusers.HiDreamImageTransformer2DModel]
MakeConditioning = Callable[..., TextConditioning]
OWN = FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.fixture(scope="module")
def arguments(make_transformer: MakeTransformer, make_conditioning: MakeConditioning) -> dict[str, Any]:
    """Everything that a picture of 80 x 32 pixels in 6 steps needs."""
    return {
        "transformer": make_transformer(torch.float32),
        "scheduler": OWN,
        "positive": make_conditioning(1, torch.float32),
        "negative": make_conditioning(1, torch.float32, seed=1),
        "width": 80,
        "height": 32,
        "num_inference_steps": 6,
        "guidance_scale": 4.0,
        "noise": initial_noise(0, 32, 80, num_channels=4),
    }


class Recorder:
    """Predicts as the model does, and keeps (timestep, unconditional, conditional) of every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, torch.Tensor, torch.Tensor]] = []

    def __call__(self, transformer: Any, latents: torch.Tensor, times: torch.Tensor, texts: Any) -> torch.Tensor:
        velocity = predict_velocity(transformer, latents, times, texts)
        unconditional, conditional = velocity.chunk(2)
        self.seen.append((float(times[0]), unconditional, conditional))
        return velocity

    def guided(self) -> list[torch.Tensor]:
        return [unconditional + 4.0 * (conditional - unconditional) for _, unconditional, conditional in self.seen]


def deviation(values: Any) -> float:
    """The sample standard deviation, one number at a time."""
    numbers = [float(value) for value in np.asarray(values, dtype=np.float64).ravel()]
    mean = sum(numbers) / len(numbers)
    squares = sum((number - mean) ** 2 for number in numbers)
    return float((squares / (len(numbers) - 1)) ** 0.5)


def test_rescaling_brings_each_sample_s_spread_back() -> None:
    generator = torch.Generator().manual_seed(0)
    guided = torch.randn(3, 4, 2, 5, generator=generator) * torch.tensor([2.0, 5.0, 9.0]).reshape(3, 1, 1, 1)
    conditional = torch.randn(3, 4, 2, 5, generator=generator)
    rescaled = rescale_guidance(guided, conditional, 0.7)
    for index in range(3):
        factor = deviation(conditional[index]) / deviation(guided[index])
        expected = 0.7 * guided[index].double() * factor + 0.3 * guided[index].double()
        assert torch.allclose(rescaled[index].double(), expected, atol=1e-5)
    assert deviation(rescale_guidance(guided, conditional, 1.0)[1]) == pytest.approx(
        deviation(conditional[1]), rel=1e-5
    )


def test_drawing_rescales_the_guided_velocity(arguments: dict[str, Any]) -> None:
    recorder = Recorder()
    latents = draw(**{**arguments, "num_inference_steps": 1}, guidance_rescale=0.5, predict=recorder)
    guided, conditional = recorder.guided()[0].double(), recorder.seen[0][2].double()
    factor = 0.5 * deviation(conditional) / deviation(guided) + 0.5
    assert torch.allclose(latents.double(), arguments["noise"] - factor * guided, atol=1e-4)


def test_without_guidance_there_is_nothing_to_rescale(arguments: dict[str, Any]) -> None:
    unguided = {**arguments, "guidance_scale": 1.0}
    assert torch.equal(draw(**unguided, guidance_rescale=0.7), draw(**unguided))


def euler_by_hand(noise: torch.Tensor, velocities: list[torch.Tensor], shift: float) -> torch.Tensor:
    """Plain float64: sigma = s u / (1 + (s - 1) u) over diffusers' grid of u, from 1 to the smallest, then 0."""
    steps = len(velocities)
    smallest = shift * 0.001 / (1 + (shift - 1) * 0.001)
    grid = [1.0 + (smallest - 1.0) * index / (steps - 1) for index in range(steps)]
    sigmas = [*(shift * u / (1 + (shift - 1) * u) for u in grid), 0.0]
    latents = noise.double()
    for index, velocity in enumerate(velocities):
        latents = latents + (sigmas[index + 1] - sigmas[index]) * velocity.double()
    return latents


@pytest.mark.parametrize("shift", [None, 1.5])
def test_euler_by_name_follows_its_formula(arguments: dict[str, Any], shift: float | None) -> None:
    recorder = Recorder()
    latents = draw(**{**arguments, "scheduler": named_scheduler("euler", OWN)}, shift=shift, predict=recorder)
    expected = euler_by_hand(arguments["noise"], recorder.guided(), shift or 3.0)
    assert torch.allclose(latents.double(), expected, atol=1e-4)


def test_flash_by_name_draws_fresh_noise_from_the_seed(arguments: dict[str, Any]) -> None:
    recorder, generator = Recorder(), torch.Generator("cpu").manual_seed(5)
    latents = draw(**{**arguments, "scheduler": named_scheduler("flash", OWN)}, seed=5, predict=recorder)
    expected = arguments["noise"].double()
    sigmas = [*(time / 1000 for time, _, _ in recorder.seen), 0.0]
    for index, velocity in enumerate(recorder.guided()):
        finished = expected - sigmas[index] * velocity.double()
        noise = torch.randn(velocity.shape, generator=generator).double()
        expected = sigmas[index + 1] * noise + (1 - sigmas[index + 1]) * finished
    assert torch.allclose(latents.double(), expected, atol=1e-3)


@pytest.mark.parametrize("shift", [3.0, 1.5])
def test_unipc_by_name_is_diffusers_own(arguments: dict[str, Any], shift: float) -> None:
    recorder = Recorder()
    latents = draw(**{**arguments, "scheduler": named_scheduler("unipc", OWN)}, shift=shift, predict=recorder)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(6)
    expected = arguments["noise"]
    for time, velocity in zip(scheduler.timesteps, recorder.guided(), strict=True):
        expected = scheduler.step(velocity, time, expected, return_dict=False)[0]
    assert [time for time, _, _ in recorder.seen] == scheduler.timesteps.tolist()
    assert torch.equal(latents, expected)


def test_the_schedulers_are_three_different_ones(arguments: dict[str, Any]) -> None:
    drawn = [draw(**{**arguments, "scheduler": named_scheduler(name, OWN)}) for name in ("unipc", "euler", "flash")]
    assert torch.equal(drawn[1], draw(**arguments))  # the checkpoint's own is Euler with the same shift
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-2)
    assert not torch.allclose(drawn[2], drawn[1], atol=1e-2)


def test_a_scheduler_by_name_takes_the_shift_of_the_checkpoint_s_own() -> None:
    own = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=6.0)
    assert named_scheduler("euler", own).config.shift == 6.0
    assert named_scheduler("unipc", FlowMatchEulerDiscreteScheduler(shift=2.0)).config.flow_shift == 2.0
    with pytest.raises(ValueError, match="there is no scheduler 'ddim'; use one of unipc, euler, flash"):
        named_scheduler("ddim", own)


@pytest.mark.parametrize(
    ("num_steps", "every", "expected"),
    [(20, 5, [1, 5, 10, 15, 20]), (6, 1, [1, 2, 3, 4, 5, 6]), (5, 3, [1, 3]), (2, 9, [1])],
)
def test_previews_come_after_the_first_and_every_so_many_steps(
    arguments: dict[str, Any], num_steps: int, every: int, expected: list[int]
) -> None:
    seen: list[StepPreview] = []
    draw(**{**arguments, "num_inference_steps": num_steps}, previews=PreviewHook(every=every, show=seen.append))
    assert [preview.step for preview in seen] == expected
    assert {preview.num_steps for preview in seen} == {num_steps}


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_a_preview_is_the_picture_that_the_step_predicts(arguments: dict[str, Any], name: str) -> None:
    seen: list[StepPreview] = []
    recorder = Recorder()
    latents = draw(
        **{**arguments, "scheduler": named_scheduler(name, OWN)},
        predict=recorder,
        previews=PreviewHook(every=1, show=seen.append),
    )
    first = arguments["noise"].double() - recorder.guided()[0].double()  # sigma is 1 there
    assert torch.allclose(seen[0].latents.double(), first, atol=1e-4)
    assert [preview.timestep for preview in seen] == pytest.approx([time for time, _, _ in recorder.seen])
    assert torch.equal(seen[-1].latents, latents)


def test_previews_change_nothing(arguments: dict[str, Any]) -> None:
    watched = draw(**{**arguments, "num_inference_steps": 2}, previews=PreviewHook(every=1, show=lambda _: None))
    assert torch.equal(watched, draw(**{**arguments, "num_inference_steps": 2}))


def test_a_compiled_model_draws_the_same(arguments: dict[str, Any]) -> None:
    compiled = CompiledPrediction(backend="eager")
    short = {**arguments, "num_inference_steps": 2}
    latents = draw(**short, predict=compiled)
    assert compiled.problem is None
    assert torch.allclose(latents, draw(**short), atol=1e-5)
    assert sum(torch._dynamo.utils.counters["stats"].values()) > 0


def test_where_nothing_can_be_compiled_the_model_draws_as_it_is(arguments: dict[str, Any]) -> None:
    compiled = CompiledPrediction(backend=_broken)
    latents = draw(**{**arguments, "num_inference_steps": 2}, predict=compiled)
    assert compiled.problem is not None
    assert "no compiler on this machine" in compiled.problem
    assert torch.equal(latents, draw(**{**arguments, "num_inference_steps": 2}))


def _broken(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler on this machine")
