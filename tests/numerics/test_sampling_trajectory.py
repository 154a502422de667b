"""Sampling trajectories against diffusers' own pipeline."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    UniPCMultistepScheduler,
)
from reverie_hidream.sampling import draw, initial_noise
from reverie_hidream.transformer import load_transformer

Load = Callable[[torch.dtype], Any]
MakeBatch = Callable[..., Any]
Error = Callable[[torch.Tensor, torch.Tensor], float]

EULER = FlowMatchEulerDiscreteScheduler(shift=3.0)
UNIPC = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


@pytest.mark.parametrize(
    ("width", "height", "guidance_scale", "scheduler"),
    [
        pytest.param(128, 128, 5.0, EULER, id="square"),
        pytest.param(256, 64, 5.0, EULER, id="non-square"),
        pytest.param(64, 256, 0.0, EULER, id="unguided"),
        pytest.param(256, 64, 3.0, UNIPC, id="unipc"),
    ],
)
def test_the_trajectory_ends_where_the_pipeline_s_does(
    width: int,
    height: int,
    guidance_scale: float,
    scheduler: Any,
    tiny_checkpoint: Path,
    load_reference: Load,
    make_batch: MakeBatch,
    relative_error: Error,
) -> None:
    batch = make_batch(16, 16, dtype=torch.float32).text
    positive, negative = (
        type(batch)(t5=batch.t5[i : i + 1], llama=batch.llama[:, i : i + 1], pooled=batch.pooled[i : i + 1])
        for i in (0, 1)
    )
    expected = pipeline(tiny_checkpoint, load_reference, scheduler)(
        width=width,
        height=height,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        generator=torch.Generator("cpu").manual_seed(42),
        prompt_embeds_t5=positive.t5,
        prompt_embeds_llama3=positive.llama,
        pooled_prompt_embeds=positive.pooled,
        negative_prompt_embeds_t5=negative.t5,
        negative_prompt_embeds_llama3=negative.llama,
        negative_pooled_prompt_embeds=negative.pooled,
        output_type="latent",
    ).images

    latents = draw(
        load_transformer(tiny_checkpoint, dtype=torch.float32),
        scheduler,
        positive,
        negative,
        width=width,
        height=height,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        noise=initial_noise(42, height, width),
    )

    assert latents.shape == expected.shape == (1, 16, height // 8, width // 8)
    assert relative_error(latents, expected) < 1e-5


def pipeline(checkpoint: Path, load_reference: Load, scheduler: Any) -> HiDreamImagePipeline:
    components = dict.fromkeys(
        f"{kind}{suffix}" for kind in ("text_encoder", "tokenizer") for suffix in ("", "_2", "_3", "_4")
    )
    made = HiDreamImagePipeline(
        scheduler=type(scheduler).from_config(scheduler.config),
        vae=AutoencoderKL.from_pretrained(checkpoint, subfolder="vae", dtype=torch.float32),
        transformer=load_reference(torch.float32).eval(),
        **components,
    )
    # The side of the area that it rescales every request to, in latent pixels: that of 128 x 128 and of 256 x 64.
    made.default_sample_size = 16
    made.set_progress_bar_config(disable=True)
    return made
