"""The VAE: shapes, independence of the batch, fingerprints and refusals. Its numbers are in tests/numerics."""

import shutil
from pathlib import Path

import pytest
import torch
from reverie_common.errors import NotFoundError
from reverie_hidream.vae import Vae, load_vae


@pytest.fixture(scope="module")
def vae(tiny_checkpoint: Path) -> Vae:
    """In float32."""
    return load_vae(tiny_checkpoint, dtype=torch.float32)


def pixels(*shape: int) -> torch.Tensor:
    """Noise in [-1, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_has_the_released_constants(vae: Vae) -> None:
    assert (vae.scaling_factor, vae.shift_factor, vae.latent_channels, vae.downsampling) == (0.3611, 0.1159, 16, 8)


def test_encodes_mean_and_deviation_at_an_eighth(vae: Vae) -> None:
    moments = vae.encode(pixels(2, 3, 64, 96))
    assert moments.shape == (2, 2, 16, 8, 12)
    assert moments.dtype == torch.float32
    assert (moments[:, 1] > 0).all()


def test_decodes_to_bytes(vae: Vae) -> None:
    pictures = vae.decode(torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(0)))
    assert pictures.shape == (2, 64, 96, 3)
    assert pictures.dtype == torch.uint8
    assert pictures.is_contiguous()


def test_the_batch_has_no_influence_on_an_image(vae: Vae) -> None:
    images = pixels(3, 3, 64, 32)
    together = vae.encode(images)
    assert torch.equal(together[1:2], vae.encode(images[1:2]))
    assert torch.equal(vae.decode(together[:, 0])[2:], vae.decode(together[2:, 0]))


def test_bfloat16_returns_float32_moments_that_are_close(tiny_checkpoint: Path, vae: Vae) -> None:
    rounded = load_vae(tiny_checkpoint).encode(pixels(1, 3, 64, 64))
    exact = vae.encode(pixels(1, 3, 64, 64))
    assert rounded.dtype == torch.float32
    # A dozen convolutions in bfloat16 at 2^-9 each.
    assert (rounded - exact).norm() / exact.norm() < 0.05


def test_latents_can_take_part_in_autograd(vae: Vae) -> None:
    weight = torch.ones((), requires_grad=True)
    (vae.encode(pixels(1, 3, 16, 16)) * weight).sum().backward()
    assert weight.grad is not None


def test_big_images_are_tiled(vae: Vae) -> None:
    assert vae.model.use_tiling
    assert vae.model.use_slicing
    assert vae.encode(pixels(1, 3, 8, 1096)).shape == (1, 2, 16, 1, 137)


def test_fingerprint_covers_weights_and_dtype(tiny_checkpoint: Path, tmp_path: Path, vae: Vae) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "elsewhere"))
    assert load_vae(copy, dtype=torch.float32).fingerprint == vae.fingerprint
    assert load_vae(copy, dtype=torch.bfloat16).fingerprint != vae.fingerprint
    config = copy / "vae" / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("0.3611", "0.3612"), encoding="utf-8")
    assert load_vae(copy, dtype=torch.float32).fingerprint != vae.fingerprint


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64), (1, 3, 60, 64), (1, 3, 64, 4)], ids=str)
def test_refuses_pixels_that_do_not_fit(vae: Vae, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.encode(pixels(*shape))


@pytest.mark.parametrize("shape", [(16, 8, 8), (1, 4, 8, 8)], ids=str)
def test_refuses_latents_that_do_not_fit(vae: Vae, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="16, h, w"):
        vae.decode(pixels(*shape))


def test_refuses_float16(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="float16"):
        load_vae(tiny_checkpoint, dtype=torch.float16)


def test_names_the_missing_part(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="vae"):
        load_vae(tmp_path)
