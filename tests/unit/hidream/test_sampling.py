"""Drawing latents: schedulers, guidance, progress and stopping."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImageTransformer2DModel, UniPCMultistepScheduler
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.sampling import SamplingStoppedError, draw, initial_noise, load_scheduler
from reverie_hidream.transformer import predict_velocity

MakeTransformer = Callable[..., HiDreamImageTransformer2DModel]
MakeConditioning = Callable[..., TextConditioning]
EULER = FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.fixture(scope="module")
def arguments(make_transformer: MakeTransformer, make_conditioning: MakeConditioning) -> dict[str, Any]:
    """Everything that a picture of 80 x 32 pixels needs."""
    return {
        "transformer": make_transformer(torch.float32),
        "scheduler": EULER,
        "positive": make_conditioning(1, torch.float32),
        "negative": make_conditioning(1, torch.float32, seed=1),
        "width": 80,
        "height": 32,
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "noise": initial_noise(0, 32, 80, num_channels=4),
    }


def write_scheduler(checkpoint: Path, config: dict[str, Any]) -> Path:
    (checkpoint / "scheduler").mkdir()
    (checkpoint / "scheduler" / "scheduler_config.json").write_text(json.dumps(config), encoding="utf-8")
    return checkpoint


def test_the_same_seed_draws_the_same_noise() -> None:
    noise = initial_noise(7, 64, 128)

    assert noise.shape == (1, 16, 8, 16)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, initial_noise(7, 64, 128))
    assert not torch.equal(noise, initial_noise(8, 64, 128))


def test_one_euler_step_is_the_guided_velocity(arguments: dict[str, Any]) -> None:
    noise, text, negative = arguments["noise"], arguments["positive"], arguments["negative"]
    with torch.no_grad():
        time = torch.tensor([1000.0])
        conditional = predict_velocity(arguments["transformer"], noise, time, text)
        unconditional = predict_velocity(arguments["transformer"], noise, time, negative)

    latents = draw(**{**arguments, "num_inference_steps": 1})

    expected = noise - (unconditional + 4.0 * (conditional - unconditional))
    assert torch.allclose(latents, expected, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
def test_guidance_up_to_one_ignores_the_negative_prompt(guidance_scale: float, arguments: dict[str, Any]) -> None:
    with_negative = draw(**{**arguments, "guidance_scale": guidance_scale})
    without = draw(**{**arguments, "guidance_scale": guidance_scale, "negative": None})

    assert torch.equal(with_negative, without)


def test_latents_have_the_size_that_was_asked_for(arguments: dict[str, Any]) -> None:
    latents = draw(**arguments)

    assert latents.shape == (1, 4, 4, 10)
    assert latents.dtype == torch.float32
    assert latents.isfinite().all()


def test_drawing_twice_gives_the_same_picture_and_leaves_the_scheduler_alone(arguments: dict[str, Any]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    timesteps = scheduler.timesteps.clone()
    first = draw(**{**arguments, "scheduler": scheduler})
    second = draw(**{**arguments, "scheduler": scheduler})

    assert torch.equal(first, second)
    assert torch.equal(scheduler.timesteps, timesteps)


def test_several_pictures_in_one_batch_are_those_drawn_alone(
    arguments: dict[str, Any], make_conditioning: MakeConditioning
) -> None:
    noises = torch.cat([initial_noise(seed, 32, 80, num_channels=4) for seed in (0, 1)])
    both = draw(
        **{
            **arguments,
            "noise": noises,
            "positive": arguments["positive"].repeat(2),
            "negative": arguments["negative"].repeat(2),
        }
    )

    assert torch.allclose(both[:1], draw(**arguments), atol=1e-4)


def test_progress_counts_the_steps(arguments: dict[str, Any]) -> None:
    seen: list[tuple[int, int]] = []

    draw(**arguments, on_step=lambda done, total: seen.append((done, total)))

    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_stops_between_two_steps(arguments: dict[str, Any]) -> None:
    seen: list[int] = []

    with pytest.raises(SamplingStoppedError, match="stopped after 2 of 3 steps"):
        draw(**arguments, on_step=lambda done, total: seen.append(done), should_stop=lambda: len(seen) == 2)

    assert seen == [1, 2]


def test_a_shift_replaces_the_scheduler_s_own(arguments: dict[str, Any]) -> None:
    own = draw(**{**arguments, "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.0)})
    given = draw(**arguments, shift=6.0)

    assert torch.equal(given, own)
    assert not torch.equal(given, draw(**arguments))


def test_unipc_draws_with_a_shift_too(arguments: dict[str, Any]) -> None:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)

    latents = draw(**{**arguments, "scheduler": scheduler, "shift": 2.0})

    assert latents.isfinite().all()


def test_dynamic_shifting_gets_the_canvas_s_mu(arguments: dict[str, Any]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)

    dynamic = draw(**{**arguments, "scheduler": scheduler})

    assert not torch.equal(dynamic, draw(**arguments))
    assert torch.equal(draw(**{**arguments, "scheduler": scheduler}, shift=3.0), draw(**arguments))


def test_a_scheduler_that_draws_noise_follows_the_seed(arguments: dict[str, Any]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    draws = [draw(**{**arguments, "scheduler": scheduler}, seed=seed) for seed in (1, 1, 2)]

    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negative": None}, "needs a negative prompt"),
        ({"noise": torch.zeros(1, 4, 8, 8)}, r"does not suit a picture of 80x32"),
        ({"width": 81}, "multiples of 16"),
        ({"width": 512, "height": 256}, "may have 8192"),
    ],
)
def test_refuses_what_cannot_be_drawn(change: dict[str, Any], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        draw(**{**arguments, **change})


def test_refuses_another_number_of_negative_prompts(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="1 prompts need as many negative ones; got 2"):
        draw(**{**arguments, "negative": arguments["negative"].repeat(2)})


def test_loads_the_scheduler_that_the_checkpoint_names(tiny_checkpoint: Path) -> None:
    scheduler = load_scheduler(tiny_checkpoint)

    assert type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert scheduler.config.shift == 3.0


def test_hidream_s_own_schedulers_are_known_by_name(tmp_path: Path) -> None:
    for name, expected, settings in (
        ("FlowUniPCMultistepScheduler", UniPCMultistepScheduler, {"flow_shift": 3.0, "use_flow_sigmas": True}),
        ("FlashFlowMatchEulerDiscreteScheduler", FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
    ):
        directory = tmp_path / name
        directory.mkdir()
        scheduler = load_scheduler(write_scheduler(directory, {"_class_name": name, "shift": 3.0}))

        assert isinstance(scheduler, expected)
        assert settings.items() <= dict(scheduler.config).items()


def test_a_missing_scheduler_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"scheduler_config.json is missing; copy scheduler/"):
        load_scheduler(tmp_path)


@pytest.mark.parametrize("name", ["NoSuchScheduler", "AutoencoderKL", ""])
def test_refuses_a_class_that_is_no_scheduler(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"names the scheduler '{name}'"):
        load_scheduler(write_scheduler(tmp_path, {"_class_name": name}))
