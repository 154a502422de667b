"""An idle sampler's transformer waits in host memory and is back for the next drawing or adapter."""

import threading
from pathlib import Path

import pytest
import torch
from reverie_hidream.adapters.config import LokrConfig
from reverie_hidream.adapters.lokr import attach_lokr
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.host_copy import HostCopy
from reverie_hidream.sampling import load_scheduler
from reverie_hidream.tensor_io import to_raw
from reverie_hidream.transformer import load_transformer
from reverie_sampler.engine import Drawing, DrawingHooks, SamplerEngine, SamplerFacts

HOOKS = DrawingHooks(on_step=lambda *_: None, should_stop=lambda: False, on_preview=lambda _: None)
FACTS = SamplerFacts(
    fingerprint="", drawing_fingerprint="", precision="no_change", device="cpu", max_pixels=65536, pixel_multiple=16
)


class Watched:
    """A real copy whose moves can be waited for; clones stand in for another device's memory."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        copies = {"copy_to_host": torch.clone, "copy_to_device": torch.clone}
        self._copy = HostCopy(transformer, torch.device("cpu"), **copies)
        self.parked = threading.Event()

    def to_host(self) -> None:
        self._copy.to_host()
        self.parked.set()

    def to_device(self) -> None:
        self.parked.clear()
        self._copy.to_device()


def drawing(adapter: str | None = None) -> Drawing:
    generator = torch.Generator().manual_seed(0)
    text = TextConditioning(
        t5=torch.randn(1, 8, 112, generator=generator),
        llama=torch.randn(4, 1, 8, 96, generator=generator),
        pooled=torch.randn(1, 80, generator=generator),
    )
    embeddings = {
        "t5": to_raw(text.t5[0]),
        "llama": to_raw(text.llama[:, 0]),
        "clip_l": to_raw(text.pooled[0, :32].clone()),
        "clip_g": to_raw(text.pooled[0, 32:].clone()),
    }
    return Drawing(
        width=64,
        height=64,
        num_inference_steps=2,
        guidance_scale=1.0,
        seed=1,
        shift=None,
        positive=embeddings,
        negative=None,
        adapter_sha256=adapter,
        adapter_strength=1.0,
    )


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_draws_the_same_before_and_after(tiny_checkpoint: Path, precision: str) -> None:
    transformer = load_transformer(tiny_checkpoint, dtype=torch.float32, precision=precision)
    watched = Watched(transformer)
    told: list[bool] = []
    engine = SamplerEngine(
        transformer,
        load_scheduler(tiny_checkpoint),
        FACTS,
        max_adapters=1,
        idle_seconds=0.05,
        on_parked=told.append,
        parkable=watched,
    )
    first = engine.draw(drawing(), HOOKS)
    assert watched.parked.wait(10)
    assert engine.draw(drawing(), HOOKS) == first
    assert watched.parked.wait(10)
    engine.add_adapter("a", attach_lokr(load_transformer(tiny_checkpoint), LokrConfig(factor=4)).export())
    assert watched.parked.wait(10)
    # The adapter is untrained, so it changes nothing.
    assert engine.draw(drawing("a"), HOOKS) == first
    engine.close()
    assert told[:6] == [True, False] * 3
