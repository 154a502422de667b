"""The sampler draws with every kind of adapter, swaps them, and is the base model again without one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reverie_hidream.adapters import FullRankConfig, LokrConfig, LoraConfig, LycorisConfig, attach_adapter
from reverie_hidream.adapters.config import AdapterConfig
from reverie_hidream.sampling import draw, initial_noise, load_scheduler
from reverie_hidream.transformer import load_transformer
from reverie_sampler.engine import SamplerEngine, load_engine

KINDS: dict[str, AdapterConfig] = {
    "lokr": LokrConfig(factor=4),
    "lora": LoraConfig(rank=4),
    "oft": LycorisConfig(algo="diag-oft", linear_dim=4),
    "one-transformer": FullRankConfig(),
    "other-transformer": FullRankConfig(),
}


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Path) -> dict[str, bytes]:
    """Adapter files that change pictures, each in a way of its own."""
    made = {}
    for seed, (name, config) in enumerate(KINDS.items()):
        adapter = attach_adapter(load_transformer(tiny_checkpoint, dtype=torch.float32), config)
        generator = torch.Generator().manual_seed(seed)
        for tensor in adapter.parameters():
            tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
        made[name] = adapter.export()
    return made


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> SamplerEngine:
    made, _ = load_engine(
        tiny_checkpoint, device="cpu", dtype="float32", precision="no_change", num_threads=1, max_adapters=8
    )
    return made


def test_every_kind_is_swapped_in_and_out(
    engine: SamplerEngine, files: dict[str, bytes], tiny_checkpoint: Path, make_picture: Callable[[Any], torch.Tensor]
) -> None:
    transformer = engine._transformer
    base = make_picture(transformer)
    alone = {}
    for name, body in files.items():
        engine.add_adapter(name, body)
        engine._select(name, 1.0)
        alone[name] = make_picture(transformer)
        assert not torch.allclose(alone[name], base, atol=1e-3)

    for name in [*reversed(files), *files]:
        engine._select(name, 1.0)
        assert torch.equal(make_picture(transformer), alone[name])
    engine._select(None, 0.0)
    assert torch.equal(make_picture(transformer), base)


@pytest.fixture(scope="module")
def make_picture(tiny_checkpoint: Path) -> Callable[[Any], torch.Tensor]:
    """The latent of one fixed prompt in two steps."""
    from reverie_hidream.conditioning import TextConditioning

    config = load_transformer(tiny_checkpoint).config
    generator = torch.Generator().manual_seed(5)
    text = TextConditioning(
        t5=torch.randn(1, 4, config.caption_channels[0], generator=generator),
        llama=torch.randn(max(config.llama_layers) + 1, 1, 4, config.caption_channels[1], generator=generator),
        pooled=torch.randn(1, config.text_emb_dim, generator=generator),
    )
    scheduler = load_scheduler(tiny_checkpoint)

    @torch.no_grad()
    def make(transformer: Any) -> torch.Tensor:
        noise = initial_noise(1, 32, 32, config.in_channels)
        return draw(
            transformer,
            scheduler,
            text,
            None,
            width=32,
            height=32,
            num_inference_steps=2,
            guidance_scale=0.0,
            noise=noise,
            seed=1,
        )

    return make
