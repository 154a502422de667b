"""Latents and pixels against diffusers' AutoencoderKL and VaeImageProcessor on the same checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from reverie_hidream.vae import load_vae

SCALE, SHIFT = 0.3611, 0.1159
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}


def pixels(height: int, width: int) -> torch.Tensor:
    """Two smooth pictures in [-1, 1], float64."""
    noise = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise.cumsum(-1).cumsum(-2).div(height).tanh()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("size", [(64, 64), (96, 160)], ids=str)
def test_moments_equal_the_scaled_posterior(tiny_checkpoint: Path, dtype: torch.dtype, size: tuple[int, int]) -> None:
    reference = AutoencoderKL.from_pretrained(tiny_checkpoint / "vae", dtype=dtype)
    images = pixels(*size).to(dtype)
    with torch.no_grad():
        posterior = reference.encode(images).latent_dist
    moments = load_vae(tiny_checkpoint, dtype=dtype).encode(images)
    assert relative(moments[:, 0], (posterior.mean - SHIFT) * SCALE) < LIMITS[dtype]
    assert relative(moments[:, 1], posterior.std * SCALE) < LIMITS[dtype]


def test_a_draw_from_the_moments_is_a_scaled_draw_from_the_posterior(tiny_checkpoint: Path) -> None:
    reference = AutoencoderKL.from_pretrained(tiny_checkpoint / "vae", dtype=torch.float64)
    images = pixels(64, 64)
    with torch.no_grad():
        drawn = reference.encode(images).latent_dist.sample(torch.Generator().manual_seed(1))
    mean, deviation = load_vae(tiny_checkpoint, dtype=torch.float64).encode(images).unbind(1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert relative(mean + deviation * noise, (drawn - SHIFT) * SCALE) < LIMITS[torch.float64]


def test_decoding_equals_the_image_processors_bytes(tiny_checkpoint: Path) -> None:
    reference = AutoencoderKL.from_pretrained(tiny_checkpoint / "vae", dtype=torch.float32)
    latents = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = reference.decode(latents / SCALE + SHIFT).sample
    expected = np.stack([np.asarray(image) for image in VaeImageProcessor().postprocess(images, output_type="pil")])
    actual = load_vae(tiny_checkpoint, dtype=torch.float32).decode(latents).numpy()
    # We decode one by one, the reference both at once: a value on the edge may round the other way.
    assert np.abs(actual.astype(int) - expected).max() <= 1
    assert (actual == expected).mean() > 0.9999
