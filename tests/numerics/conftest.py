"""Inputs for comparing our mathematics with diffusers' own on the tiny checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from reverie_hidream.conditioning import TextConditioning


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One training batch."""

    latents: torch.Tensor
    noise: torch.Tensor
    sigmas: torch.Tensor
    text: TextConditioning


@pytest.fixture(scope="session")
def load_reference(tiny_checkpoint: Path) -> Callable[[torch.dtype], HiDreamImageTransformer2DModel]:
    """Loads the transformer as a reader of diffusers' documentation would."""

    def load(dtype: torch.dtype) -> HiDreamImageTransformer2DModel:
        return HiDreamImageTransformer2DModel.from_pretrained(tiny_checkpoint, subfolder="transformer", dtype=dtype)

    return load


@pytest.fixture(scope="session")
def make_batch(tiny_checkpoint: Path) -> Callable[..., Batch]:
    """Draws a batch for the tiny transformer, 16 text tokens for each encoder; the same numbers in every dtype."""
    config = HiDreamImageTransformer2DModel.load_config(tiny_checkpoint, subfolder="transformer")
    t5_width, llama_width = config["caption_channels"]
    num_layers = max(config["llama_layers"]) + 1

    def make(height: int, width: int, *, batch_size: int = 2, dtype: torch.dtype = torch.float64) -> Batch:
        generator = torch.Generator().manual_seed(1000 * height + width)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        return Batch(
            latents=normal(batch_size, 16, height, width),
            noise=normal(batch_size, 16, height, width),
            sigmas=torch.linspace(0.9, 0.2, batch_size, dtype=torch.float64).to(dtype),
            text=TextConditioning(
                t5=normal(batch_size, 16, t5_width),
                llama=normal(num_layers, batch_size, 16, llama_width),
                pooled=normal(batch_size, config["text_emb_dim"]),
            ),
        )

    return make


@pytest.fixture(scope="session")
def relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Norm of the difference over the norm of the expected tensor."""

    def measure(found: torch.Tensor, expected: torch.Tensor) -> float:
        return float((found.double() - expected.double()).norm() / expected.double().norm())

    return measure
