"""What the sampler is asked for in one round of validation."""

from __future__ import annotations

from collections.abc import Iterator

from reverie.common.v1.common_pb2 import ObjectRef
from reverie.sampling.v1.sampling_pb2 import SampleRequest

from reverie_trainer.jobs.preparing.prompt_library import prompts_of
from reverie_trainer.jobs.spec import Validation, ValidationPrompt


def count_pictures(validation: Validation) -> int:
    """Pictures of one round."""
    return len(prompts_of(validation)) * len(validation.resolutions) * validation.num_images


def picture_requests(
    validation: Validation, adapter: ObjectRef | None, *, weights: str
) -> Iterator[tuple[str, SampleRequest]]:
    """Yield (prompt name, request) for every prompt and size.

    The request carries the prompt, never its name: names are for files, and no embedding is kept under one.

    Args:
        adapter: of the round; None draws with the base model.
        weights: `adapter` or `ema`; only of the former previews are made, which is enough to watch.
    """
    for prompt in prompts_of(validation):
        for resolution in validation.resolutions:
            request = _request(validation, prompt, resolution)
            if adapter is not None:
                request.adapter.CopyFrom(adapter)
            request.preview_steps = validation.preview_steps if weights == "adapter" else 0
            yield prompt.name, request


def _request(validation: Validation, prompt: ValidationPrompt, resolution: str) -> SampleRequest:
    width, height = resolution.lower().split("x")
    own = prompt.adapter_strength
    return SampleRequest(
        prompt=prompt.prompt,
        negative_prompt=validation.negative_prompt,
        width=int(width),
        height=int(height),
        num_inference_steps=validation.num_inference_steps,
        guidance_scale=validation.guidance_scale,
        guidance_rescale=validation.guidance_rescale,
        seed=validation.seed,
        num_images=validation.num_images,
        adapter_strength=validation.adapter_strength if own is None else own,
        scheduler=validation.scheduler,
        shift=validation.shift,
        clip_score=validation.clip_score,
        compile=validation.compile,
    )
