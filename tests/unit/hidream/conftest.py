"""A transformer so small that a test of it takes milliseconds, with HiDream's real classes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.tiny_weights import draw_weights
from reverie_hidream.transformer import prepare_transformer
from torch import nn

SMALL_CONFIG: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "caption_channels": [32, 48],
    "text_emb_dim": 16,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": [8, 4, 4],
    "max_resolution": [8, 16],
    "llama_layers": [0, 1, 1],
}

MakeTransformer = Callable[..., HiDreamImageTransformer2DModel]
MakeConditioning = Callable[..., TextConditioning]


@pytest.fixture(scope="session")
def make_transformer() -> MakeTransformer:
    """Builds the small transformer, prepared for training; the same weights every time."""

    def make(dtype: torch.dtype = torch.float64, precision: str = "no_change") -> HiDreamImageTransformer2DModel:
        transformer = HiDreamImageTransformer2DModel(**SMALL_CONFIG)
        draw_weights(transformer, seed=0, component="transformer")
        # The class's own `to` warns of modules that must stay float32, of which it has none.
        nn.Module.to(transformer, dtype)
        prepare_transformer(transformer, precision=precision)
        return transformer

    return make


@pytest.fixture(scope="session")
def make_conditioning() -> MakeConditioning:
    """Builds embeddings of so many prompts for the small transformer: 5 T5 and 5 Llama tokens each."""

    def make(batch_size: int = 1, dtype: torch.dtype = torch.float64, seed: int = 0) -> TextConditioning:
        generator = torch.Generator().manual_seed(seed)
        return TextConditioning(
            t5=torch.randn(batch_size, 5, 32, generator=generator, dtype=torch.float64).to(dtype),
            llama=torch.randn(2, batch_size, 5, 48, generator=generator, dtype=torch.float64).to(dtype),
            pooled=torch.randn(batch_size, 16, generator=generator, dtype=torch.float64).to(dtype),
        )

    return make
