"""Embeddings against diffusers' own HiDreamImagePipeline.encode_prompt on the same checkpoint."""

from pathlib import Path

import pytest
import torch
from diffusers import HiDreamImagePipeline
from reverie_hidream.text import ENCODER_NAMES, load_text_encoder

PROMPTS = [
    "a photo of an astronaut in a white suit",
    "",
    "A red fox! And 12 OWLS; caf\u00e9 \u4f60\u597d",
    "In the style of an old master: a long line of words, one after another. " * 30,
    '!!! <|endoftext|> it\'s a sign that says "open"',
]
# float32: the pipeline multiplies all prompts at once and we one by one, which rounds differently.
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}


def reference(checkpoint: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What diffusers makes of all prompts at once: clip (B, L+G), t5 (B, 128, D), llama (layers, B, 128, D)."""
    pipeline = HiDreamImagePipeline.from_pretrained(checkpoint, transformer=None, vae=None, dtype=dtype)
    with torch.no_grad():
        t5, _, llama, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    return {"t5": t5, "llama": llama, "pooled": pooled}


def ours(checkpoint: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What our encoders make of each prompt, put together as the pipeline does."""
    encoded = {name: load_text_encoder(checkpoint, name, dtype=dtype).encode(PROMPTS) for name in ENCODER_NAMES}
    stacked = {name: torch.stack([one.tensor for one in many]) for name, many in encoded.items()}
    pooled = torch.cat([stacked["clip_l"], stacked["clip_g"]], dim=-1)
    return {"t5": stacked["t5"], "llama": stacked["llama"].transpose(0, 1), "pooled": pooled}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_embeddings_equal_the_pipelines(tiny_checkpoint: Path, dtype: torch.dtype) -> None:
    expected, actual = reference(tiny_checkpoint, dtype), ours(tiny_checkpoint, dtype)
    errors = {name: ((actual[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected}
    assert {name: tensor.shape for name, tensor in actual.items()} == {n: t.shape for n, t in expected.items()}
    assert max(errors.values()) < LIMITS[dtype], errors


def test_no_single_prompt_or_layer_deviates(tiny_checkpoint: Path) -> None:
    expected, actual = reference(tiny_checkpoint, torch.float32), ours(tiny_checkpoint, torch.float32)
    for name in expected:
        worst = (actual[name] - expected[name]).abs().max() / expected[name].abs().max()
        assert worst < LIMITS[torch.float32], name


def test_llamas_last_layer_is_normalised_and_the_others_are_not(tiny_checkpoint: Path) -> None:
    llama = ours(tiny_checkpoint, torch.float32)["llama"]
    spreads = llama.pow(2).mean(dim=(1, 2, 3)).sqrt()
    # RMSNorm with weights near 1.
    assert spreads[-1] == pytest.approx(1.0, abs=0.05)
    assert (spreads[1:-1] > 1.2).all()
