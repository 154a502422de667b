"""A worker's memory: against what torch allocates in a step of small models, and part by part against spec 10.2."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from reverie_hidream.adapters import LokrConfig, attach_lokr
from reverie_hidream.adapters.config import LokrPreset as ModelPreset
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.memory import spread
from reverie_hidream.transformer import (
    REAL_CONFIG,
    enable_gradient_checkpointing,
    predict_velocity,
    prepare_transformer,
)
from reverie_trainer.jobs.admission.adapter_selection import TransformerConfig, select_adapter
from reverie_trainer.jobs.admission.memory_estimate import Batch, largest_batch, text_values, total_bytes, worker_memory
from reverie_trainer.jobs.spec import DatasetChoice, JobSpec, LokrAdapter, LokrPreset, Memory, ModelChoice, Optimization
from reverie_trainer.jobs.spec.measures import Ema
from torch import nn
from torch.profiler import ProfilerActivity, profile

RELEASED = TransformerConfig.from_json(REAL_CONFIG)
WIDE: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "caption_channels": [96, 96],
    "text_emb_dim": 80,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": [32, 16, 16],
    "max_resolution": [64, 64],
    "llama_layers": [0, 1, 2, 2, 2],
}
ATTENTION, BOTH = ("Attention",), ("Attention", "FeedForward")
SIDE = 32


def make_spec(classes: tuple[str, ...] = ATTENTION, **changes: Any) -> JobSpec:
    spec = JobSpec(
        adapter=LokrAdapter(factor=4, apply_preset=LokrPreset(target_module=classes)),
        optimization=Optimization(max_steps=1, optimizer="adamw"),
        datasets=(DatasetChoice(dataset="d", resolution=1024),),
    )
    return replace(spec, **changes)


def estimate(spec: JobSpec, config: TransformerConfig, batch: Batch) -> dict[str, int]:
    assert isinstance(spec.adapter, LokrAdapter)
    parts = worker_memory(spec, config, select_adapter(config, spec.adapter), batch)
    return {part.name.partition(" (")[0]: part.size_bytes for part in parts}


def measure(classes: tuple[str, ...], batch_size: int, *, checkpointing: bool, dtype: torch.dtype) -> int:
    """Bytes that torch holds at the peak of a training step: weights, adapter, state, and all that comes and goes."""
    transformer = HiDreamImageTransformer2DModel(**WIDE)
    nn.Module.to(transformer, dtype)
    prepare_transformer(transformer)
    adapter = attach_lokr(transformer, LokrConfig(factor=4, apply_preset=ModelPreset(target_module=classes)), seed=1)
    enable_gradient_checkpointing(transformer, checkpointing)
    optimizer = torch.optim.AdamW(adapter.parameters())
    text = TextConditioning(
        t5=torch.randn(batch_size, 128, 96),
        llama=torch.randn(3, batch_size, 128, 96),
        pooled=torch.randn(batch_size, 80),
    ).to("cpu", dtype)
    latents = torch.randn(batch_size, 16, SIDE, SIDE)

    def step() -> None:
        velocity = predict_velocity(transformer, latents, torch.full((batch_size,), 500.0), text)
        velocity.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # the optimizer makes its state
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    held = [*transformer.parameters(), *adapter.parameters(), *state, latents, text.t5, text.llama, text.pooled]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    now = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return sum(int(tensor.nbytes) for tensor in held) + int(peak)


@pytest.mark.parametrize(
    ("classes", "batch_size", "checkpointing"),
    [(ATTENTION, 1, True), (ATTENTION, 2, False), (BOTH, 1, False), (BOTH, 2, True)],
)
def test_activations_are_what_torch_allocates(classes: tuple[str, ...], batch_size: int, checkpointing: bool) -> None:
    spec = make_spec(classes, optimization=Optimization(max_steps=1, gradient_checkpointing=checkpointing))
    parts = estimate(
        spec, TransformerConfig.from_json(WIDE), Batch(num_samples=batch_size, image_tokens=SIDE * SIDE // 4)
    )
    parts.pop("context and fragmentation")
    measured = measure(classes, batch_size, checkpointing=checkpointing, dtype=torch.bfloat16)
    weights = parts["transformer weights"]
    assert sum(parts.values()) == pytest.approx(measured, rel=0.06)
    # The weights are most of it: the rest has to fit by itself too.
    assert sum(parts.values()) - weights == pytest.approx(measured - weights, rel=0.12)


def test_float32_takes_what_torch_allocates() -> None:
    spec = make_spec(model=ModelChoice(mixed_precision="no"))
    parts = estimate(spec, TransformerConfig.from_json(WIDE), Batch(num_samples=1, image_tokens=SIDE * SIDE // 4))
    parts.pop("context and fragmentation")
    measured = measure(ATTENTION, 1, checkpointing=True, dtype=torch.float32)
    weights = parts["transformer weights"]
    assert sum(parts.values()) - weights == pytest.approx(measured - weights, rel=0.12)


FULL_SIZE = Batch(num_samples=1, image_tokens=4096)


@pytest.mark.parametrize(
    ("precision", "weights", "low", "high"), [("no_change", 34.21e9, 37e9, 38e9), ("int8-quanto", 17.11e9, 20e9, 22e9)]
)
def test_parts_are_those_of_the_published_budget(precision: str, weights: float, low: float, high: float) -> None:
    adapter = LokrAdapter(factor=16, apply_preset=LokrPreset(target_module=ATTENTION))
    optimization = Optimization(max_steps=1, optimizer="optimi-lion")
    spec = make_spec(model=ModelChoice(base_precision=precision), adapter=adapter, optimization=optimization)
    parts = estimate(spec, RELEASED, FULL_SIZE)
    assert parts["transformer weights"] == pytest.approx(weights, rel=0.002)
    assert parts["adapter, gradient, optimi-lion state"] == 12 * select_adapter(RELEASED, adapter).num_parameters
    assert parts["inputs of 48 recomputed blocks"] == 48 * 4480 * 2560 * 2
    assert 0.8e9 < parts["one recomputed block"] + parts["gradients of activations, latents"] < 1.5e9
    assert parts["text embeddings"] == 34_607_104
    assert parts["context and fragmentation"] + parts.get("de-quantised weights", 0) == pytest.approx(0.9e9, rel=0.3)
    assert low < sum(parts.values()) < high


def test_one_caption_takes_what_the_specification_says() -> None:
    assert text_values(RELEASED) * 2 == pytest.approx(34.6e6, rel=0.001)


def test_every_setting_changes_its_part_and_no_other() -> None:
    base = estimate(make_spec(), RELEASED, FULL_SIZE)

    def changed(**changes: Any) -> dict[str, int]:
        other = estimate(make_spec(**changes), RELEASED, FULL_SIZE)
        return {
            name: other.get(name, 0) - base.get(name, 0) for name in other | base if other.get(name) != base.get(name)
        }

    num_parameters = select_adapter(RELEASED, make_spec().adapter).num_parameters  # type: ignore[arg-type]  # a LoKr
    adapter = "adapter, gradient, adamw state"
    assert changed(ema=Ema()) == {adapter: 4 * num_parameters}
    released = Optimization(max_steps=1, gradient_release=True)
    assert changed(optimization=released) == {adapter: -4 * num_parameters}
    assert changed(model=ModelChoice(base_precision="nf4-bnb"))["transformer weights"] < -24e9
    stream = 4480 * 2560 * 2
    every_other = changed(memory=Memory(gradient_checkpointing_interval=2))
    assert every_other.pop("inputs of 48 recomputed blocks") == -48 * stream
    assert every_other.pop("inputs of 24 recomputed blocks") == 24 * stream
    assert 20e9 < every_other.pop("activations of 24 blocks") < 24 * 1e9
    assert not every_other
    offloaded = changed(memory=Memory(num_offloaded_blocks=20))
    mixture = 4 * 3 * 2560 * 6912 + 3 * 2560 * 3584
    single = (4 * 2560**2 + 6 * 2560**2 + mixture) * 2
    double = (8 * 2560**2 + 12 * 2560**2 + mixture + 3 * 2560 * 6912) * 2
    assert offloaded.keys() == {"transformer weights"}
    # The worker spreads them, and has two slots of the largest size on the device.
    waiting = sum(double if index < 16 else single for index in spread(20, 48))
    assert offloaded["transformer weights"] == pytest.approx(2 * double - waiting, rel=0.01)


def test_the_largest_bucket_decides_and_a_picture_that_is_not_square_has_one_token_more() -> None:
    spec = make_spec(optimization=Optimization(max_steps=1, batch_size=3))
    assert largest_batch(spec, RELEASED, None) == Batch(num_samples=3, image_tokens=4096)
    sizes = [(512, 512), (640, 448), (448, 512)]
    assert largest_batch(spec, RELEASED, sizes) == Batch(num_samples=3, image_tokens=40 * 28 + 1)


def test_the_total_is_the_sum() -> None:
    selection = select_adapter(RELEASED, LokrAdapter())
    parts = worker_memory(make_spec(), RELEASED, selection, FULL_SIZE)
    assert total_bytes(parts) == sum(part.size_bytes for part in parts)
