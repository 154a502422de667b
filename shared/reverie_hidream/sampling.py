"""Drawing latents with the transformer: schedulers, guidance, the loop (spec 1.7).

At the size asked for: diffusers' pipeline rescales every request to one megapixel, this does not.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from reverie_common.sampling_methods import SCHEDULERS

from reverie_hidream.conditioning import TextConditioning, join
from reverie_hidream.flow import automatic_mu
from reverie_hidream.transformer import VAE_SCALE, check_image_size, predict_velocity

DEFAULT_SHIFT = 3.0
_FLOW_UNIPC: Mapping[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

Predict = Callable[
    [diffusers.HiDreamImageTransformer2DModel, torch.Tensor, torch.Tensor, TextConditioning], torch.Tensor
]
"""What predicts a velocity: `predict_velocity`, or the same compiled."""

_OFFICIAL_SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    # Classes of HiDream's own code, and the diffusers class and settings that do the same (spec 1.7).
    "FlowUniPCMultistepScheduler": (
        "UniPCMultistepScheduler",
        _FLOW_UNIPC,
    ),
    "FlashFlowMatchEulerDiscreteScheduler": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
}


class SamplingStoppedError(Exception):
    """`should_stop` answered yes; nothing was drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPreview:
    """What a picture would be if it were finished after this step."""

    step: int
    """Steps done, from 1."""
    num_steps: int
    timestep: float
    """0 to 1000: where the step began."""
    latents: torch.Tensor
    """(B, C, h, w) float32, scaled, on the model's device: x0 as the step predicts it, after the last step the result.

    The latents of the step itself are mostly noise for the first half of the schedule; their x0 shows the composition
    from the first step on.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewHook:
    """Who sees a picture on its way, and how often."""

    every: int
    """After the first step and after every so many (spec 7.5); at least 1."""
    show: Callable[[StepPreview], None]

    def is_due(self, step: int) -> bool:
        """Whether there is a preview after so many steps."""
        return step == 1 or step % self.every == 0


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


def named_scheduler(name: str, own: Any) -> Any:
    """A scheduler by its name, with the shift of the checkpoint's own.

    `unipc` is diffusers' UniPC of order 2 on flow sigmas; `euler` is flow-matching Euler; `flash` is Euler that draws
    fresh noise at every step, as HiDream's Dev and Fast do (spec 1.7).

    Raises:
        ValueError: the name is none of SCHEDULERS.
    """
    shift = own.config.get("flow_shift") or own.config.get("shift") or DEFAULT_SHIFT
    if name == "unipc":
        return diffusers.UniPCMultistepScheduler(**_FLOW_UNIPC, flow_shift=shift)
    if name in ("euler", "flash"):
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=name == "flash")
    raise ValueError(
        f"there is no scheduler {name!r}; use one of {', '.join(SCHEDULERS)}, or none for the checkpoint's"
    )


def rescale_guidance(guided: torch.Tensor, conditional: torch.Tensor, share: float) -> torch.Tensor:
    """Bring the spread of a guided prediction back to the conditional one's, sample by sample (spec 7.2).

    Args:
        guided: (B, C, h, w).
        conditional: (B, C, h, w), the prediction without guidance.
        share: phi, 0 (as guided) to 1 (the spread of the conditional one).

    Returns:
        share * guided * std(conditional) / std(guided) + (1 - share) * guided.
    """
    dims = tuple(range(1, guided.ndim))
    ratio = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return share * (guided * ratio) + (1.0 - share) * guided


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
    guidance_rescale: float = 0.0,
    predict: Predict = predict_velocity,
    on_step: Callable[[int, int], None] | None = None,
    previews: PreviewHook | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> torch.Tensor:
    """Turn noise into latents. Blocks for all steps.

    Args:
        scheduler: its settings are taken, it is not changed.
        positive: embeddings of B prompts.
        negative: what guidance steers away from; needed where `guidance_scale` is above 1.
        width, height: pixels of the picture that the latents decode to.
        noise: (B, C, height / 8, width / 8), standard normal.
        guidance_scale: classifier-free guidance; up to 1 switches it off, and halves the time.
        shift: of the schedule; None is the scheduler's own.
        seed: for the schedulers that draw noise at every step.
        guidance_rescale: 0 to 1; see `rescale_guidance`.
        predict: what computes velocities; a `CompiledPrediction` is faster once it is compiled.
        on_step: called after every step with (steps done, steps in all); then come the previews.
        should_stop: asked before every step.

    Returns:
        (B, C, height / 8, width / 8) float32, scaled: decode after `latents / scaling_factor + shift_factor`.

    Raises:
        ValueError: the size, the noise's shape or the missing negative prompt.
        SamplingStoppedError: `should_stop` said so.
    """
    check_image_size(transformer, width=width, height=height)
    _check_inputs(positive, negative, noise, guidance_scale, width, height)
    guidance = _Guidance(scale=guidance_scale, rescale=guidance_rescale)
    weight = transformer.x_embedder.proj.bias
    conditioning = guidance.join(positive, negative).to(weight.device, weight.dtype)
    stepper = _start_schedule(scheduler, num_inference_steps, transformer.max_seq, shift, weight.device)
    step_arguments = _step_arguments(stepper, seed)

    latents = noise.to(weight.device, torch.promote_types(noise.dtype, torch.float32))
    for index, timestep in enumerate(stepper.timesteps):
        if should_stop is not None and should_stop():
            raise SamplingStoppedError(f"stopped after {index} of {len(stepper.timesteps)} steps")
        velocity = guidance.velocity(predict, transformer, latents, timestep, conditioning)
        before, latents = latents, stepper.step(velocity, timestep, latents, return_dict=False, **step_arguments)[0]
        if on_step is not None:
            on_step(index + 1, len(stepper.timesteps))
        _show(previews, stepper, index, before, velocity, latents)
    return latents


def _show(
    hook: PreviewHook | None,
    stepper: Any,
    index: int,
    before: torch.Tensor,
    velocity: torch.Tensor,
    after: torch.Tensor,
) -> None:
    if hook is None or not hook.is_due(index + 1):
        return
    num_steps = len(stepper.timesteps)
    is_last = index + 1 == num_steps
    hook.show(
        StepPreview(
            step=index + 1,
            num_steps=num_steps,
            timestep=float(stepper.timesteps[index]),
            latents=after if is_last else before - stepper.sigmas[index].to(before) * velocity,
        )
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Guidance:
    scale: float
    rescale: float

    def join(self, positive: TextConditioning, negative: TextConditioning | None) -> TextConditioning:
        """The unconditional half comes first, as in every HiDream pipeline."""
        return join(negative, positive) if self.scale > 1.0 and negative is not None else positive

    def velocity(
        self,
        predict: Predict,
        transformer: diffusers.HiDreamImageTransformer2DModel,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: TextConditioning,
    ) -> torch.Tensor:
        if self.scale <= 1.0:
            return predict(transformer, latents, timestep.expand(latents.shape[0]), conditioning)
        inputs = torch.cat([latents, latents])
        velocity = predict(transformer, inputs, timestep.expand(inputs.shape[0]), conditioning)
        unconditional, conditional = velocity.chunk(2)
        guided = unconditional + self.scale * (conditional - unconditional)
        return rescale_guidance(guided, conditional, self.rescale) if self.rescale > 0.0 else guided


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
