"""The world, its captions and the meter that reads its pictures."""

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from reverie_hidream.randomness import Draw
from reverie_hidream.shapes.captions import (
    EMPTY_SHARE,
    caption_of,
    claims_of,
    invented_word,
    parse_caption,
    training_caption,
)
from reverie_hidream.shapes.drawing import Picture, draw_scene
from reverie_hidream.shapes.evaluate import unseen_captions
from reverie_hidream.shapes.meter import components, read_picture, score
from reverie_hidream.shapes.world import COLOURS, PICTURE_SIZES, SHAPES, Scene, World

NUM_SCENES = 2000


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [World(seed=3).training_scene(index) for index in range(NUM_SCENES)]


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    assert World(seed=3).training_scene(7) == World(seed=3).training_scene(7)
    assert World(seed=3).training_scene(7) != World(seed=4).training_scene(7)


def test_the_world_is_balanced(scenes: list[Scene]) -> None:
    shapes = Counter(thing.shape for scene in scenes for thing in scene.things)
    grounds = Counter(scene.background for scene in scenes)
    assert set(shapes) == set(SHAPES)
    assert set(grounds) == set(COLOURS)
    assert min(shapes.values()) > 0.8 * sum(shapes.values()) / len(SHAPES)
    assert min(grounds.values()) > 0.75 * NUM_SCENES / len(COLOURS)
    assert {(scene.width, scene.height) for scene in scenes} == set(PICTURE_SIZES)
    assert 0.2 < sum(len(scene.things) == 2 for scene in scenes) / NUM_SCENES < 0.3


def test_training_never_sees_what_evaluation_asks_for(scenes: list[Scene]) -> None:
    assert not any(scene.is_held_out for scene in scenes)
    assert all(World(seed=3).unseen_scene(index).is_held_out for index in range(50))


def test_there_are_256_different_unseen_captions() -> None:
    captions = unseen_captions(256)
    assert len(set(captions)) == 256
    assert captions == unseen_captions(256)


def test_captions_say_what_their_scenes_are(scenes: list[Scene]) -> None:
    draw = Draw(seed=3, stream="test")
    for index, scene in enumerate(scenes):
        said, true = parse_caption(caption_of(scene, draw, index)), claims_of(scene)
        assert said.background == true.background
        assert sorted((t.shape, t.colour) for t in said.things) == sorted((t.shape, t.colour) for t in true.things)
        assert said.arrangement in (None, true.arrangement)
        assert (said.row, said.column) in ((None, None), (true.row, true.column))


def test_a_caption_with_an_unknown_noun_still_promises_the_rest() -> None:
    claims = parse_caption("a small red zorp on a yellow background")
    assert claims.background == "yellow"
    assert (claims.things[0].shape, claims.things[0].colour, claims.things[0].size) == (None, "red", "small")


def test_training_captions_are_empty_as_often_as_they_should_be(scenes: list[Scene]) -> None:
    draw = Draw(seed=3, stream="test")
    captions = [training_caption(scene, draw, 5, index) for index, scene in enumerate(scenes)]
    assert abs(sum(not caption for caption in captions) / NUM_SCENES - EMPTY_SHARE) < 0.03
    assert captions == [training_caption(scene, draw, 5, index) for index, scene in enumerate(scenes)]


def test_the_word_of_the_example_is_never_invented() -> None:
    generator = Draw(seed=0, stream="test").generator(0, 0)
    assert "zorp" not in {invented_word(generator) for _ in range(5000)}


def test_the_meter_is_right_about_true_drawings(scenes: list[Scene]) -> None:
    wrong = [scene for scene in scenes if not score(claims_of(scene), read_picture(draw_scene(scene))).all_right]
    assert len(wrong) < 0.01 * NUM_SCENES


def test_the_meter_is_right_about_blurred_and_noisy_drawings() -> None:
    scenes = [World(seed=8, picture_size=(64, 64)).training_scene(index) for index in range(NUM_SCENES)]
    generator = np.random.default_rng(0)
    pictures = [_worn(draw_scene(scene), generator) for scene in scenes]
    wrong = [
        scene
        for scene, picture in zip(scenes, pictures, strict=True)
        if not score(claims_of(scene), read_picture(picture)).all_right
    ]
    assert len(wrong) < 0.01 * NUM_SCENES


def test_the_meter_finds_every_promise_that_is_broken(scenes: list[Scene]) -> None:
    scene = next(one for one in scenes if len(one.things) == 1)
    other = next(one for one in scenes if len(one.things) == 1 and one.background != scene.background)
    kept = score(claims_of(scene), read_picture(draw_scene(other)))
    assert not kept.background
    assert not kept.all_right


def test_an_empty_picture_holds_nothing() -> None:
    assert not read_picture(np.full((64, 64, 3), 20, dtype=np.uint8)).things


def test_components_are_connected_also_diagonally_and_round_corners() -> None:
    mask = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]], dtype=bool)
    assert sorted(int(part.sum()) for part in components(mask)) == [2, 7]


def _worn(picture: Picture, generator: np.random.Generator) -> Picture:
    """As a VAE gives it back: blurred by 0.7 pixels, with noise of deviation 4."""
    weights = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 0.7**2))
    pixels: npt.NDArray[np.float64] = picture.astype(np.float64)
    for axis in (0, 1):
        padded = np.pad(pixels, [(3, 3) if axis == side else (0, 0) for side in range(3)], mode="edge")
        taken = [np.take(padded, range(start, start + pixels.shape[axis]), axis=axis) for start in range(7)]
        pixels = np.einsum("k,khwc->hwc", weights / weights.sum(), np.stack(taken))
    worn = np.rint(pixels + generator.normal(0, 4, pixels.shape))
    return np.clip(worn, 0, 255).astype(np.uint8)
