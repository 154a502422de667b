"""Drawing latents with the transformer: schedulers, guidance, the loop (spec 1.7).

At the size asked for: diffusers' pipeline rescales every request to one megapixel, this does not.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch

from reverie_hidream.conditioning import TextConditioning, join
from reverie_hidream.flow import automatic_mu
from reverie_hidream.transformer import VAE_SCALE, check_image_size, predict_velocity

_OFFICIAL_SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    # Classes of HiDream's own code, and the diffusers class and settings that do the same (spec 1.7).
    "FlowUniPCMultistepScheduler": (
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    ),
    "FlashFlowMatchEulerDiscreteScheduler": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
}


class SamplingStoppedError(Exception):
    """`should_stop` answered yes; nothing was drawn."""


def load_scheduler(checkpoint: Path) -> Any:
    """The scheduler of `scheduler/` in a checkpoint: the diffusers class that its configuration names.

    Raises:
        FileNotFoundError: there is no configuration.
        ValueError: it names no scheduler that diffusers has.
    """
    path = checkpoint / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy scheduler/ of the checkpoint there")
    config = json.loads(path.read_text(encoding="utf-8"))
    name = config.get("_class_name", "")
    alias, extra = _OFFICIAL_SCHEDULERS.get(name, (name, {}))
    scheduler_class = getattr(diffusers, alias, None)
    if scheduler_class is None or not alias.endswith("Scheduler"):
        raise ValueError(f"{path} names the scheduler {name!r}, which diffusers {diffusers.__version__} does not have")
    if alias == "UniPCMultistepScheduler" and alias != name:
        extra = {**extra, "flow_shift": config.get("shift", 3.0)}
    return scheduler_class.from_config(config, **extra)


def initial_noise(seed: int, height: int, width: int, num_channels: int = 16) -> torch.Tensor:
    """Noise to start a picture from: (1, num_channels, height / 8, width / 8) float32, from torch's CPU generator.

    The same as diffusers' pipeline draws with `torch.Generator("cpu").manual_seed(seed)` in float32.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1, num_channels, height // VAE_SCALE, width // VAE_SCALE, generator=generator)


@torch.no_grad()
def draw(
    transformer: diffusers.HiDreamImageTransformer2DModel,
    scheduler: Any,
    positive: TextConditioning,
    negative: TextConditioning | None = None,
    *,
    width: int,
    height: int,
    num_inference_steps: int,
    guidance_scale: float,
    noise: torch.Tensor,
    shift: float | None = None,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> torch.Tensor:
    """Turn noise into latents. Blocks for all steps.

    Args:
        scheduler: its settings are taken, it is not changed; concurrent draws may share it.
        positive: embeddings of B prompts.
        negative: what guidance steers away from; needed where `guidance_scale` is above 1.
        width: pixels, of the picture that the latents decode to.
        height: pixels.
        noise: (B, C, height / 8, width / 8), standard normal.
        guidance_scale: classifier-free guidance; up to 1 switches it off, and halves the time.
        shift: of the schedule; None is the scheduler's own.
        seed: for the schedulers that draw noise at every step.
        on_step: called after every step with (steps done, steps in all).
        should_stop: asked before every step.

    Returns:
        (B, C, height / 8, width / 8) float32, scaled: decode after `latents / scaling_factor + shift_factor`.

    Raises:
        ValueError: the size, the noise's shape or the missing negative prompt.
        SamplingStoppedError: `should_stop` said so.
    """
    check_image_size(transformer, width=width, height=height)
    _check_inputs(positive, negative, noise, guidance_scale, width, height)
    device = transformer.x_embedder.proj.bias.device
    # The unconditional half comes first, as in every HiDream pipeline.
    conditioning = join(negative, positive) if guidance_scale > 1.0 and negative is not None else positive
    conditioning = conditioning.to(device, transformer.x_embedder.proj.bias.dtype)
    stepper = _start_schedule(scheduler, num_inference_steps, transformer.max_seq, shift, device)
    step_arguments = _step_arguments(stepper, seed)

    latents = noise.to(device, torch.promote_types(noise.dtype, torch.float32))
    num_steps = len(stepper.timesteps)
    for index, timestep in enumerate(stepper.timesteps):
        if should_stop is not None and should_stop():
            raise SamplingStoppedError(f"stopped after {index} of {num_steps} steps")
        velocity = _guided_velocity(transformer, latents, timestep, conditioning, guidance_scale)
        latents = stepper.step(velocity, timestep, latents, return_dict=False, **step_arguments)[0]
        if on_step is not None:
            on_step(index + 1, num_steps)
    return latents


def _guided_velocity(
    transformer: diffusers.HiDreamImageTransformer2DModel,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    conditioning: TextConditioning,
    guidance_scale: float,
) -> torch.Tensor:
    if guidance_scale <= 1.0:
        return predict_velocity(transformer, latents, timestep.expand(latents.shape[0]), conditioning)
    inputs = torch.cat([latents, latents])
    velocity = predict_velocity(transformer, inputs, timestep.expand(inputs.shape[0]), conditioning)
    unconditional, conditional = velocity.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def _check_inputs(
    positive: TextConditioning,
    negative: TextConditioning | None,
    noise: torch.Tensor,
    guidance_scale: float,
    width: int,
    height: int,
) -> None:
    if noise.shape[-2:] != (height // VAE_SCALE, width // VAE_SCALE):
        raise ValueError(f"noise of {tuple(noise.shape)} does not suit a picture of {width}x{height} pixels")
    if guidance_scale <= 1.0:
        return
    if negative is None:
        raise ValueError(f"guidance_scale {guidance_scale} is above 1 and needs a negative prompt, which may be empty")
    if negative.batch_size != positive.batch_size:
        raise ValueError(f"{positive.batch_size} prompts need as many negative ones; got {negative.batch_size}")


def _start_schedule(
    scheduler: Any, num_inference_steps: int, max_tokens: int, shift: float | None, device: torch.device
) -> Any:
    stepper = scheduler.from_config(scheduler.config, **_shift_settings(scheduler, shift))
    arguments: dict[str, Any] = {}
    if "mu" in inspect.signature(stepper.set_timesteps).parameters and stepper.config.get("use_dynamic_shifting"):
        # The pipelines take the canvas's token count, not the picture's (spec 1.7).
        arguments["mu"] = automatic_mu(max_tokens)
    stepper.set_timesteps(num_inference_steps, device=device, **arguments)
    return stepper


def _shift_settings(scheduler: Any, shift: float | None) -> dict[str, Any]:
    if shift is None:
        return {}
    for key in ("flow_shift", "shift"):
        if key in scheduler.config:
            fixed = {"use_dynamic_shifting": False} if "use_dynamic_shifting" in scheduler.config else {}
            return {key: shift, **fixed}
    raise ValueError(f"the scheduler {type(scheduler).__name__} has no shift that could be set to {shift}")


def _step_arguments(stepper: Any, seed: int) -> dict[str, Any]:
    if "generator" in inspect.signature(stepper.step).parameters:
        return {"generator": torch.Generator("cpu").manual_seed(seed)}
    return {}
