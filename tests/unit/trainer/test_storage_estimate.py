"""What the store holds: the figures of spec 6.4, and the parts."""

import math

import pytest
from reverie.training.v1 import job_pb2
from reverie_hidream.transformer import REAL_CONFIG
from reverie_trainer.jobs.admission.adapter_selection import TransformerConfig
from reverie_trainer.jobs.admission.storage_estimate import storage_parts, storage_totals

RELEASED = TransformerConfig.from_json(REAL_CONFIG)
CAPTIONS = 10_000
PIXELS = CAPTIONS * 1024 * 1024


def parts(storage: str, num_prompts: int = CAPTIONS) -> dict[str, job_pb2.EstimatePart]:
    found = storage_parts(storage, RELEASED, num_prompts=num_prompts, num_pixels=PIXELS)
    return {part.name: part for part in found}


def text_bytes(storage: str) -> int:
    return sum(part.size_bytes for name, part in parts(storage).items() if name != "latents")


def test_ten_thousand_captions_take_346_gb_exactly() -> None:
    # Shapes of spec 1.2, bfloat16.
    shapes = [(128, 4096), (32, 128, 4096), (768 + 1280,)]
    assert text_bytes("exact") == CAPTIONS * sum(math.prod(shape) * 2 for shape in shapes)
    assert text_bytes("exact") == pytest.approx(346e9, rel=0.001)
    assert parts("exact")["T5 embeddings"].size_bytes == CAPTIONS * 1_048_576
    assert parts("exact")["Llama embeddings"].size_bytes == CAPTIONS * 33_554_432
    assert parts("exact")["pooled embeddings"].size_bytes == CAPTIONS * 4096
    assert parts("exact")["Llama embeddings"].least_bytes == pytest.approx(CAPTIONS * 33_554_432 / 1.6, rel=1e-6)


def test_compact_takes_17_of_32_bits_and_on_demand_a_bounded_number() -> None:
    assert text_bytes("compact") == pytest.approx(346e9 * 17 / 32, rel=0.001)
    # 256 objects of four encoders are 64 prompts; the empty one is kept for good.
    assert text_bytes("on_demand") == 65 * 34_607_104
    assert parts("on_demand", num_prompts=10)["pooled embeddings"].size_bytes == 10 * 4096


def test_latents_are_the_same_under_all() -> None:
    # mean and std, float32: 2 MiB for a megapixel.
    assert {parts(storage)["latents"].size_bytes for storage in ("exact", "compact", "on_demand")} == {
        CAPTIONS * 2 * 16 * 128 * 128 * 4
    }


def test_totals_are_sums() -> None:
    totals = storage_totals({storage: list(parts(storage).values()) for storage in ("exact", "compact")})
    assert [total.name for total in totals] == ["exact", "compact"]
    assert totals[0].size_bytes == sum(part.size_bytes for part in parts("exact").values())
    assert totals[0].least_bytes == pytest.approx(
        CAPTIONS * (2 * 2**20 + 4096 + (33_554_432 + 1_048_576) / 1.6), rel=1e-6
    )
    assert totals[1].least_bytes == totals[1].size_bytes
