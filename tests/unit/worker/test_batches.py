"""What a batch holds: latents, masks, captions and roles of its samples, and the batches that are only measured."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from reverie.common.v1.common_pb2 import TensorRef
from reverie_common.storage import MemoryStore, put_tensor
from reverie_hidream.tensor_io import to_raw
from reverie_hidream.training.draws import SampleDraws
from reverie_hidream.training.evaluation import evaluation_noise
from reverie_hidream.training.objective import ObjectiveSettings
from reverie_trainer.worker.choices import Chance
from reverie_trainer.worker.data import BatchMaker
from reverie_trainer.worker.samples import Caption, PreparedData, PreparedSample, Source
from reverie_trainer.worker.schedule import Visit
from reverie_trainer.worker.tensor_cache import TensorCache

SHAPE = (16, 8, 8)
PLAIN = Source(dataset="cats")


class Shelf:
    """Tensors in a store, and data that refer to them."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self._number = 0

    def put(self, tensor: torch.Tensor) -> TensorRef:
        self._number += 1
        return put_tensor(self.store, f"v1/test/{self._number}", "t", to_raw(tensor), compressed=False)

    def caption(self, text: str, value: float) -> Caption:
        """A caption whose embeddings are all of one value."""
        shapes = {"clip_l": (768,), "clip_g": (1280,), "t5": (4, 8), "llama": (2, 4, 8)}
        embeddings = {name: self.put(torch.full(shape, value)) for name, shape in shapes.items()}
        return Caption(text=text, embeddings=embeddings)

    def sample(self, name: str, mean: float, *, mask: float | None = None, captions: int = 1) -> PreparedSample:
        moments = torch.stack([torch.full(SHAPE, mean), torch.zeros(SHAPE)])
        return PreparedSample(
            dataset="cats",
            name=name,
            width=64,
            height=64,
            image_sha256=f"{ord(name[0]):064x}",
            latents=self.put(moments),
            captions=((*(self.caption(f"{name}{order}", 10.0 + order) for order in range(captions)),),),
            mask=None if mask is None else self.put(torch.full((1, 8, 8), mask)),
        )

    def data(self, source: Source, *samples: PreparedSample) -> PreparedData:
        return PreparedData(sources=(source,), samples=samples, empty_caption=self.caption("", 0.0))

    def maker(self, data: PreparedData, **settings: float) -> BatchMaker:
        draws = SampleDraws(seed=1, settings=ObjectiveSettings(**settings))  # type: ignore[arg-type]
        return BatchMaker(data, TensorCache(self.store, max_bytes=1 << 24), Chance(seed=1), draws)


@pytest.fixture
def shelf() -> Shelf:
    """An empty shelf."""
    return Shelf()


def visits(*samples: int, step: int = 1) -> list[Visit]:
    return [Visit(sample=sample, step=step, position=place) for place, sample in enumerate(samples)]


def test_masks_of_the_samples_weigh_and_a_sample_without_one_counts_whole(shelf: Shelf) -> None:
    data = shelf.data(
        replace(PLAIN, mask_type="segmentation"), shelf.sample("a", 1.0, mask=0.25), shelf.sample("b", 2.0)
    )
    batch = shelf.maker(data).make(visits(1, 0))
    assert batch.mask_type == "segmentation"
    assert batch.masks is not None
    assert batch.masks.shape == (2, 1, 8, 8)
    assert batch.masks.mean(dim=(1, 2, 3)).tolist() == [1.0, 0.25]
    assert batch.latents.mean(dim=(1, 2, 3)).tolist() == [2.0, 1.0]


@pytest.mark.parametrize(("mask_type", "mask"), [("none", 0.5), ("mask", None)])
def test_a_batch_has_no_masks_where_none_are_wanted_or_there(shelf: Shelf, mask_type: str, mask: float | None) -> None:
    data = shelf.data(replace(PLAIN, mask_type=mask_type), shelf.sample("a", 1.0, mask=mask))
    assert shelf.maker(data).make(visits(0)).masks is None


@pytest.mark.parametrize(("role", "expected"), [("train", False), ("regularisation", True)])
def test_a_batch_says_whether_it_is_regularisation(shelf: Shelf, role: str, expected: bool) -> None:
    data = shelf.data(replace(PLAIN, role=role), shelf.sample("a", 1.0))
    assert shelf.maker(data).make(visits(0)).is_regularisation is expected


def test_the_offset_of_a_dataset_moves_its_noise_levels(shelf: Shelf) -> None:
    sample = shelf.sample("a", 1.0)
    shift, scale, offset = 3.0, 1.0, 0.7
    plain = shelf.maker(shelf.data(PLAIN, sample)).make(visits(0)).draws.sigmas.double()
    moved = shelf.maker(shelf.data(replace(PLAIN, timestep_sampling_offset=offset), sample)).make(visits(0)).draws
    # Back from sigma to the normal number: undo the shift, then the sigmoid.
    level = plain / (shift - (shift - 1) * plain)
    normal = torch.log(level / (1 - level)) / scale
    expected = torch.sigmoid(scale * (normal + offset))
    expected = shift * expected / (1 + (shift - 1) * expected)
    assert torch.allclose(moved.sigmas.double(), expected, atol=1e-6)
    assert torch.equal(moved.noise, shelf.maker(shelf.data(PLAIN, sample)).make(visits(0)).draws.noise)


def test_every_order_of_a_caption_is_shown(shelf: Shelf) -> None:
    maker = shelf.maker(shelf.data(PLAIN, shelf.sample("a", 1.0, captions=8)))
    shown = {float(maker.make(visits(0, step=step)).conditioning.t5.mean()) for step in range(1, 80)}
    assert shown == {10.0 + order for order in range(8)}


@pytest.fixture
def measured(shelf: Shelf) -> Callable[[int], list[float]]:
    """Latents of the evaluation batches of three images that are not in the order of their names."""
    data = shelf.data(
        replace(PLAIN, role="evaluation"),
        *(shelf.sample(name, mean) for name, mean in (("c", 3.0), ("a", 1.0), ("b", 2.0))),
    )
    return lambda count: [float(batch.latents.mean()) for batch in shelf.maker(data).evaluation_batches("cats", count)]


def test_evaluation_takes_the_first_images_by_name(measured: Callable[[int], list[float]]) -> None:
    assert measured(2) == [1.0, 2.0]
    assert measured(9) == [1.0, 2.0, 3.0]


def test_evaluation_leaves_nothing_to_chance(shelf: Shelf) -> None:
    sample = shelf.sample("a", 1.0, captions=3)
    data = shelf.data(replace(PLAIN, role="evaluation"), sample)
    first, again = (next(iter(shelf.maker(data).evaluation_batches("cats", 1))) for _ in range(2))
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.noise[0], evaluation_noise(sample.image_sha256, SHAPE))
    assert float(first.conditioning.t5.mean()) == 10.0
    assert np.isclose(float(first.noise.std()), 1.0, atol=0.1)
