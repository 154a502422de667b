"""A dropped caption is the encoded empty one, in every encoder together (spec 3.5)."""

from collections.abc import Mapping

import torch
from reverie.common.v1.common_pb2 import TensorRef
from reverie_common.storage import MemoryStore, put_tensor
from reverie_hidream.conditioning import ENCODERS, collate
from reverie_hidream.tensor_io import to_raw
from reverie_hidream.training.batch import Batch
from reverie_hidream.training.draws import SampleDraws
from reverie_hidream.training.objective import ObjectiveSettings
from reverie_trainer.worker.choices import Chance
from reverie_trainer.worker.data import BatchMaker
from reverie_trainer.worker.samples import Caption, PreparedData, PreparedSample, Source
from reverie_trainer.worker.schedule import Visit
from reverie_trainer.worker.tensor_cache import TensorCache

SHAPES = {"clip_l": (6,), "clip_g": (10,), "t5": (4, 8), "llama": (3, 4, 8)}
SIZE = (16, 4, 6)
NUM_SAMPLES = 40


def _encoding(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


EMPTY, CAT = _encoding(0), _encoding(1)


def _batch(store: MemoryStore, dropout: float) -> Batch:
    def put(key: str, tensor: torch.Tensor) -> TensorRef:
        return put_tensor(store, key, "t", to_raw(tensor), compressed=False)

    def caption(text: str, encoding: Mapping[str, torch.Tensor]) -> Caption:
        refs = {name: put(f"{text or 'empty'}/{name}", encoding[name]) for name in ENCODERS}
        return Caption(text=text, embeddings=refs)

    sample = PreparedSample(
        dataset="pets",
        name="cat",
        width=48,
        height=32,
        image_sha256="ab" * 32,
        latents=put("latents", torch.rand(2, *SIZE)),
        captions=((caption("a cat", CAT),),),
    )
    data = PreparedData(sources=(Source(dataset="pets"),), samples=(sample,), empty_caption=caption("", EMPTY))
    chance = Chance(seed=5, caption_dropout_probability=dropout)
    draws = SampleDraws(seed=5, settings=ObjectiveSettings())
    maker = BatchMaker(data, TensorCache(store, max_bytes=1 << 20), chance, draws)
    return maker.make([Visit(sample=0, step=4, position=place) for place in range(NUM_SAMPLES)])


def test_t5_llama_and_pooled_all_become_those_of_the_empty_text(memory_store: MemoryStore) -> None:
    found, expected = _batch(memory_store, 1.0).conditioning, collate([EMPTY] * NUM_SAMPLES)
    assert torch.equal(found.t5, expected.t5)
    assert torch.equal(found.llama, expected.llama)
    assert torch.equal(found.pooled, expected.pooled)


def test_a_sample_is_dropped_as_a_whole_or_not_at_all(memory_store: MemoryStore) -> None:
    found = _batch(memory_store, 0.5).conditioning
    empty = collate([EMPTY])
    is_dropped = [bool(torch.equal(found.t5[place], empty.t5[0])) for place in range(NUM_SAMPLES)]
    expected = collate([EMPTY if dropped else CAT for dropped in is_dropped])
    assert 5 < sum(is_dropped) < 35
    assert torch.equal(found.t5, expected.t5)
    assert torch.equal(found.llama, expected.llama)
    assert torch.equal(found.pooled, expected.pooled)
