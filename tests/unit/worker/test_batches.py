"""A batch put together from the store: its captions, masks and draws are those of its samples."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from reverie.common.v1.common_pb2 import TensorRef
from reverie_common.storage import MemoryStore, put_tensor
from reverie_hidream.conditioning import ENCODERS, collate
from reverie_hidream.tensor_io import to_raw
from reverie_hidream.training.draws import SampleDraws
from reverie_hidream.training.evaluation import evaluation_noise
from reverie_hidream.training.objective import ObjectiveSettings
from reverie_trainer.worker.choices import Chance
from reverie_trainer.worker.data import BatchMaker
from reverie_trainer.worker.samples import Caption, PreparedData, PreparedSample, Source
from reverie_trainer.worker.schedule import Visit
from reverie_trainer.worker.tensor_cache import TensorCache

SHAPES = {"clip_l": (6,), "clip_g": (10,), "t5": (4, 8), "llama": (3, 4, 8)}
SIZE = (16, 4, 6)


class World:
    """A store with three samples of one source, the last one without a mask."""

    def __init__(self, **source: Any) -> None:
        self.store = MemoryStore()
        self.texts = {text: self._tensors(text) for text in ("a cat", "a dog", "")}
        self.masks = [torch.rand(1, *SIZE[1:], generator=torch.Generator().manual_seed(index)) for index in range(2)]
        samples = [self._sample(index) for index in range(3)]
        self.data = PreparedData(
            sources=(Source(dataset="pets", **source),), samples=tuple(samples), empty_caption=self._caption("")
        )

    def maker(self, *, dropout: float = 0.0, **objective: Any) -> BatchMaker:
        chance = Chance(seed=5, caption_dropout_probability=dropout)
        draws = SampleDraws(seed=5, settings=ObjectiveSettings(**objective))
        return BatchMaker(self.data, TensorCache(self.store, max_bytes=1 << 20), chance, draws)

    def _sample(self, index: int) -> PreparedSample:
        posterior = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(10 + index)).abs()
        return PreparedSample(
            dataset="pets",
            name=f"pet-{index}",
            width=8 * SIZE[2],
            height=8 * SIZE[1],
            image_sha256=f"{index}" * 64,
            latents=self._put(f"latents/{index}", posterior),
            captions=((self._caption("a cat" if index else "a dog"),),),
            mask=self._put(f"masks/{index}", self.masks[index]) if index < 2 else None,
        )

    def _caption(self, text: str) -> Caption:
        tensors = self.texts[text]
        refs = {name: self._put(f"{text or 'empty'}/{name}", tensors[name]) for name in ENCODERS}
        return Caption(text=text, embeddings=refs)

    def _tensors(self, text: str) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(len(text) + 100 * ord(text[2:3] or "-"))
        return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}

    def _put(self, key: str, tensor: torch.Tensor) -> TensorRef:
        return put_tensor(self.store, key, "t", to_raw(tensor), compressed=False)


def _visits(samples: Sequence[int] = (0, 1, 2)) -> list[Visit]:
    return [Visit(sample=sample, step=4, position=place) for place, sample in enumerate(samples)]


def test_a_dropped_caption_is_the_encoded_empty_one_in_every_encoder() -> None:
    world = World()
    found = world.maker(dropout=1.0).make(_visits()).conditioning
    expected = collate([world.texts[""]] * 3)
    assert torch.equal(found.t5, expected.t5)
    assert torch.equal(found.llama, expected.llama)
    assert torch.equal(found.pooled, expected.pooled)
    assert bool(found.t5.abs().sum() > 0)


def test_a_caption_that_is_kept_is_the_sample_s_own() -> None:
    world = World()
    found = world.maker(dropout=0.0).make(_visits()).conditioning
    expected = collate([world.texts[text] for text in ("a dog", "a cat", "a cat")])
    assert torch.equal(found.t5, expected.t5)
    assert torch.equal(found.llama, expected.llama)
    assert torch.equal(found.pooled, expected.pooled)


def test_draws_are_those_of_the_objective_with_the_source_s_offset() -> None:
    world = World(timestep_sampling_offset=1.5)
    found = world.maker().make(_visits())
    expected = SampleDraws(seed=5, settings=ObjectiveSettings()).draw(4, [0, 1, 2], SIZE, timestep_offset=1.5)
    assert torch.equal(found.draws.sigmas, expected.sigmas)
    assert torch.equal(found.noise, expected.noise)
    assert not torch.equal(found.draws.sigmas, World().maker().make(_visits()).draws.sigmas)


@pytest.mark.parametrize("mask_type", ["mask", "segmentation"])
def test_a_sample_without_a_mask_counts_as_a_whole(mask_type: str) -> None:
    world = World(mask_type=mask_type)
    found = world.maker().make(_visits())
    assert found.mask_type == mask_type
    assert found.masks is not None
    assert torch.equal(found.masks[:2], torch.stack(world.masks))
    assert torch.equal(found.masks[2], torch.ones(1, *SIZE[1:]))


def test_masks_are_left_out_unless_asked_for() -> None:
    assert World().maker().make(_visits()).masks is None


@pytest.mark.parametrize(("role", "expected"), [("train", False), ("regularisation", True)])
def test_a_regularisation_source_makes_regularisation_batches(role: str, expected: bool) -> None:
    assert World(role=role).maker().make(_visits()).is_regularisation is expected


def test_evaluation_batches_are_the_first_images_by_name_without_chance() -> None:
    world = World(role="evaluation")
    maker = world.maker(dropout=1.0)
    first, second = (list(maker.evaluation_batches("pets", 2)) for _ in range(2))
    assert len(first) == 2
    for one, other, sample in zip(first, second, world.data.samples, strict=False):
        mean = TensorCache(world.store, max_bytes=1 << 20).get(sample.latents)[0]
        assert torch.equal(one.latents, mean[None])
        assert torch.equal(one.noise[0], evaluation_noise(sample.image_sha256, SIZE))
        assert torch.equal(one.noise, other.noise)
        assert torch.equal(one.conditioning.t5, other.conditioning.t5)
    assert torch.equal(first[0].conditioning.t5[0], world.texts["a dog"]["t5"])
