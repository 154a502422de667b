"""The memory of a worker on the released model, against the budget of spec 10.2, and sizes in the store of spec 6.4."""

import pytest
from reverie.encoder.v1 import encoder_pb2
from reverie_trainer.jobs.adapter_selection import TransformerConfig, select_adapter
from reverie_trainer.jobs.estimate import storage_bytes, worker_memory_bytes
from reverie_trainer.jobs.spec import Checkpoints, JobSpec, LokrAdapter, ModelChoice, Optimization

RELEASED = TransformerConfig(
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=16,
    num_single_layers=32,
    attention_head_dim=128,
    num_attention_heads=20,
    caption_channels=(4096, 4096),
    text_emb_dim=2048,
    num_routed_experts=4,
    llama_layers=(*range(32), *[31] * 16),
    max_resolution=(128, 128),
)


def memory(precision: str) -> int:
    adapter = LokrAdapter()
    spec = JobSpec(
        name="seed",
        model=ModelChoice(base_precision=precision),
        datasets=(),
        adapter=adapter,
        optimization=Optimization(max_steps=1, optimizer="optimi-lion"),
        checkpoints=Checkpoints(),
        validation=None,
    )
    return worker_memory_bytes(spec, RELEASED, select_adapter(RELEASED, adapter))


@pytest.mark.parametrize(("precision", "low", "high"), [("no_change", 37e9, 38e9), ("int8-quanto", 20e9, 22e9)])
def test_memory_is_that_of_the_published_budget(precision: str, low: float, high: float) -> None:
    assert low < memory(precision) < high


def test_one_caption_takes_what_the_specification_says() -> None:
    shapes = {"CLIP_L": [768], "CLIP_G": [1280], "T5": [128, 4096], "LLAMA": [32, 128, 4096]}
    descriptions = [
        encoder_pb2.EncoderDescription(shape=shape, dtype="BF16", fingerprint=name) for name, shape in shapes.items()
    ]
    assert storage_bytes(1, descriptions, 0) == pytest.approx(34.6e6, rel=0.001)
    assert storage_bytes(0, descriptions, 1024 * 1024) == 2 * 16 * 128 * 128 * 4
