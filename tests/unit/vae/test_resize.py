"""Resizing equals Pillow's LANCZOS within one step of 255, also where torch's own filter does not."""

import numpy as np
import pytest
import torch
from PIL import Image
from reverie_vae.resize import resize_lanczos

SIZES = [
    pytest.param((1200, 900), (256, 192), id="reduce-much"),
    pytest.param((1001, 777), (499, 387), id="reduce-by-two"),
    pytest.param((800, 600), (512, 384), id="reduce-little"),
    pytest.param((512, 512), (448, 448), id="reduce-very-little"),
    pytest.param((400, 300), (640, 480), id="enlarge"),
    pytest.param((400, 300), (400, 150), id="height-only"),
    pytest.param((400, 300), (333, 300), id="width-only"),
    pytest.param((600, 150), (150, 300), id="narrower-and-higher"),
    pytest.param((64, 64), (1, 1), id="one-pixel"),
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size_in", "size_out"), SIZES)
def test_equals_pillow_within_one_step_on_noise(
    size_in: tuple[int, int], size_out: tuple[int, int], channels: int
) -> None:
    # White noise is the worst case: every filter tap sees a value of its own.
    noise = np.random.default_rng(7).integers(0, 256, (size_in[1], size_in[0], channels), dtype=np.uint8)
    resized = resize_lanczos(torch.from_numpy(noise).permute(2, 0, 1), width=size_out[0], height=size_out[1])
    expected = np.atleast_3d(np.array(Image.fromarray(noise.squeeze()).resize(size_out, Image.Resampling.LANCZOS)))
    difference = resized.permute(1, 2, 0).numpy().astype(int) - expected
    assert resized.dtype == torch.uint8
    assert np.abs(difference).max() <= 1


def test_the_same_size_is_the_same_pixels() -> None:
    pixels = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(3, 8, 8)
    assert torch.equal(resize_lanczos(pixels, width=8, height=8), pixels)
