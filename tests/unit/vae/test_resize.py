"""Resizing equals Pillow's LANCZOS within one step of 255: at any size, for any pixels, in either order of passes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from reverie_vae.resize import resize_lanczos

Pattern = Callable[[np.random.Generator, tuple[int, int, int]], np.ndarray]

SIZES = [
    pytest.param((1200, 900), (256, 192), id="reduce-much"),
    pytest.param((1001, 777), (499, 387), id="reduce-by-two"),
    pytest.param((800, 600), (512, 384), id="reduce-little"),
    pytest.param((512, 512), (448, 448), id="reduce-very-little"),
    pytest.param((640, 480), (634, 475), id="reduce-hardly"),
    pytest.param((400, 300), (640, 480), id="enlarge"),
    pytest.param((300, 200), (1200, 800), id="enlarge-by-four"),
    pytest.param((400, 300), (400, 150), id="height-only"),
    pytest.param((400, 300), (333, 300), id="width-only"),
    pytest.param((600, 150), (150, 300), id="narrower-and-higher"),
    pytest.param((120, 500), (200, 90), id="wider-and-lower"),
    pytest.param((200, 900), (150, 700), id="tall"),
    pytest.param((900, 40), (90, 38), id="width-much-height-little"),
    pytest.param((300, 200), (290, 181), id="order-by-width"),
    pytest.param((300, 200), (290, 179), id="order-by-height"),
    pytest.param((64, 64), (1, 1), id="to-one-pixel"),
    pytest.param((1, 1), (17, 9), id="from-one-pixel"),
    pytest.param((1, 300), (5, 100), id="from-one-column"),
    pytest.param((300, 1), (100, 7), id="from-one-row"),
]


def noise(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """White noise: every filter tap sees a value of its own."""
    return rng.integers(0, 256, shape, dtype=np.uint8)


def dots(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Black and white at random: values overshoot and are clipped between the passes."""
    return np.asarray(rng.integers(0, 2, shape) * 255, np.uint8)


def stripes(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """One pixel black, one white: halved, every value lies half-way between two steps."""
    return np.broadcast_to((np.indices(shape)[:2].sum(axis=0) % 2 * 255).astype(np.uint8), shape)


def edges(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Flat rectangles of random greys."""
    coarse = rng.integers(0, 256, (-(-shape[0] // 37), -(-shape[1] // 23), shape[2]), dtype=np.uint8)
    return coarse.repeat(37, axis=0).repeat(23, axis=1)[: shape[0], : shape[1]]


def greatest_difference(pixels: np.ndarray, size: tuple[int, int]) -> int:
    """Between ours and Pillow's resizing of (H, W, C) pixels to (width, height)."""
    ours = resize_lanczos(torch.from_numpy(pixels.copy()).permute(2, 0, 1), width=size[0], height=size[1])
    assert (ours.dtype, ours.shape) == (torch.uint8, (pixels.shape[2], size[1], size[0]))
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
    expected = np.array(image.resize(size, Image.Resampling.LANCZOS)).reshape(size[1], size[0], -1)
    return int(np.abs(ours.permute(1, 2, 0).numpy().astype(int) - expected).max())


@pytest.mark.parametrize("pattern", [noise, dots, stripes, edges])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size_in", "size_out"), SIZES)
def test_equals_pillow_within_one_step(
    size_in: tuple[int, int], size_out: tuple[int, int], channels: int, pattern: Pattern
) -> None:
    pixels = pattern(np.random.default_rng(7), (size_in[1], size_in[0], channels))
    assert greatest_difference(pixels, size_out) <= 1


@pytest.mark.parametrize("seed", range(60))
def test_equals_pillow_within_one_step_at_any_size(seed: int) -> None:
    rng = np.random.default_rng(seed)
    width_in, height_in = (int(size) for size in np.exp(rng.uniform(0, np.log(500), 2)))
    width, height = (max(1, int(size * np.exp(rng.uniform(-2.3, 0.7)))) for size in (width_in, height_in))
    assert greatest_difference(noise(rng, (height_in, width_in, 3)), (width, height)) <= 1


@pytest.mark.parametrize("reduction", [0.8, 1.01, 1.1, 1.3, 1.75, 2.0, 2.5, 4.0, 7.3])
def test_errors_that_would_add_up_are_kept_apart(reduction: float) -> None:
    # Equal rows: torch's first pass errs in all of them at once. With two passes of torch some values are 2 steps off.
    rng = np.random.default_rng(3)
    side = round(150 * reduction)
    rows = noise(rng, (1, side, 3)).repeat(side, axis=0)
    rows[rng.random((side, side)) < 0.02] //= 2
    assert greatest_difference(rows, (150, 150)) <= 1


def test_strides_do_not_matter() -> None:
    pixels = torch.from_numpy(noise(np.random.default_rng(1), (90, 70, 3))).permute(2, 0, 1)
    turned = pixels.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(resize_lanczos(turned, width=60, height=81), resize_lanczos(pixels, width=60, height=81))


def test_the_same_size_is_the_same_pixels() -> None:
    pixels = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(3, 8, 8)
    assert torch.equal(resize_lanczos(pixels, width=8, height=8), pixels)
