"""Reading usable files: what a person sees, on the fast path and by Pillow, for every mode and rotation."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from reverie_vae.images import ResizeCrop, inspect_image, read_pixels, read_pixels_with_pillow

Picture = Callable[..., Image.Image]
Save = Callable[..., bytes]

PLAN = ResizeCrop(resize_width=96, resize_height=90, crop_left=10, crop_top=7, width=64, height=64)
BOX = (10, 7, 74, 71)
ORIENTATION_TAG = 0x0112


def by_hand(image: Image.Image) -> np.ndarray:
    """What PLAN makes of an upright RGB image, (64, 64, 3)."""
    return np.asarray(image.resize((96, 90), Image.Resampling.LANCZOS).crop(BOX))


def greatest_difference(pixels: torch.Tensor, expected: np.ndarray) -> int:
    """Between (3, h, w) and (h, w, 3)."""
    return int(np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - expected).max())


JPEG_KINDS: list[dict[str, Any]] = [
    {},
    {"progressive": True},
    {"optimize": True, "quality": 20},
    {"subsampling": "4:4:4"},
    {"subsampling": "4:2:2"},
    {"subsampling": "4:1:1"},
    {"keep_rgb": True},
    {"restart_marker_blocks": 4},
]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", JPEG_KINDS, ids=str)
def test_jpeg_equals_pillow_within_one_step(picture: Picture, save: Save, mode: str, options: dict[str, Any]) -> None:
    body = save(picture().convert(mode), "JPEG", **(options if mode == "RGB" else {}))
    expected = by_hand(Image.open(io.BytesIO(body)).convert("RGB"))
    assert greatest_difference(read_pixels(body, PLAN), expected) <= 1
    assert greatest_difference(read_pixels_with_pillow(body, PLAN), expected) == 0


@pytest.mark.parametrize("format_name", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_other_formats_equal_pillow(picture: Picture, save: Save, format_name: str) -> None:
    body = save(picture(), format_name)
    expected = by_hand(Image.open(io.BytesIO(body)).convert("RGB"))
    assert greatest_difference(read_pixels(body, PLAN), expected) == 0


def test_pixels_are_three_contiguous_channels(picture: Picture, save: Save) -> None:
    for image in (picture(), picture().convert("L")):
        pixels = read_pixels(save(image, "JPEG"), PLAN)
        assert (pixels.shape, pixels.dtype, pixels.is_contiguous()) == ((3, 64, 64), torch.uint8, True)


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_comes_first(picture: Picture, save: Save, format_name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    body = save(picture(), format_name, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(body))).convert("RGB")
    found = inspect_image(body)
    assert (found.width, found.height, found.format) == (*upright.size, format_name)
    assert greatest_difference(read_pixels(body, PLAN), by_hand(upright)) <= 1


def test_a_grey_jpeg_is_rotated_too(picture: Picture, save: Save) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 8
    body = save(picture().convert("L"), "JPEG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(body))).convert("RGB")
    assert greatest_difference(read_pixels(body, PLAN), by_hand(upright)) <= 1


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing_is_none(picture: Picture, save: Save, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    body = save(picture(), "JPEG", exif=exif)
    assert (inspect_image(body).width, inspect_image(body).height) == (200, 144)


def test_unreadable_exif_is_not_the_pixels_fault(picture: Picture, save: Save) -> None:
    body = save(picture(), "JPEG", exif=b"Exif\x00\x00" + bytes(range(40)))
    assert inspect_image(body).width == 200


@pytest.mark.parametrize(
    ("format_name", "mode"), [("PNG", "P"), ("PNG", "1"), ("PNG", "L"), ("TIFF", "CMYK"), ("JPEG", "CMYK")]
)
def test_modes_become_rgb(picture: Picture, save: Save, format_name: str, mode: str) -> None:
    body = save(picture().convert(mode), format_name)
    expected = by_hand(Image.open(io.BytesIO(body)).convert("RGB"))
    assert greatest_difference(read_pixels(body, PLAN), expected) == 0


@pytest.mark.parametrize("format_name", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(save: Save, format_name: str) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    plan = ResizeCrop(resize_width=64, resize_height=64, crop_left=0, crop_top=0, width=64, height=64)
    pixels = read_pixels(save(Image.fromarray(ramp), format_name), plan)
    expected = np.round(ramp.astype(np.float64) / 65535 * 255).astype(np.uint8)
    assert np.array_equal(pixels.numpy(), np.stack([expected] * 3))


@pytest.mark.parametrize(
    ("format_name", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA"), ("TIFF", "RGBA"), ("PNG", "PA")]
)
def test_what_is_transparent_becomes_white(save: Save, format_name: str, mode: str) -> None:
    left_half = Image.new("L", (64, 64), 255)
    left_half.paste(0, (0, 0, 32, 64))
    image = Image.new("RGB", (64, 64), "black")
    image.putalpha(left_half)
    source = image if mode in ("RGBA", "PA") else image.convert(mode)
    body = save(source.quantize() if mode == "PA" else source, format_name, **_lossless(format_name))
    plan = ResizeCrop(resize_width=64, resize_height=64, crop_left=0, crop_top=0, width=64, height=64)
    pixels = read_pixels(body, plan)
    assert bool((pixels[:, :, :32] == 255).all())
    assert bool((pixels[:, :, 32:] == 0).all())


def _lossless(format_name: str) -> dict[str, bool]:
    return {"lossless": True} if format_name == "WEBP" else {}


def test_a_transparent_colour_becomes_white(save: Save) -> None:
    plan = ResizeCrop(resize_width=64, resize_height=64, crop_left=0, crop_top=0, width=64, height=64)
    body = save(Image.new("RGB", (64, 64), (9, 8, 7)), "PNG", transparency=(9, 8, 7))
    assert bool((read_pixels(body, plan) == 255).all())


def test_a_colour_profile_is_ignored(picture: Picture, save: Save) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    plain, profiled = save(picture(), "PNG"), save(picture(), "PNG", icc_profile=profile)
    assert plain != profiled
    assert torch.equal(read_pixels(plain, PLAN), read_pixels(profiled, PLAN))


def test_a_phones_multi_picture_jpeg_is_its_photograph(picture: Picture, save: Save) -> None:
    body = save(picture(), "MPO", save_all=True, append_images=[picture(64, 48, seed=1)])
    found = inspect_image(body)
    assert (found.width, found.height, found.format) == (200, 144, "JPEG")
    assert greatest_difference(read_pixels(body, PLAN), by_hand(Image.open(io.BytesIO(body)).convert("RGB"))) <= 1


def test_bytes_after_the_end_do_no_harm(picture: Picture, save: Save) -> None:
    body = save(picture(), "JPEG")
    assert torch.equal(read_pixels(body + b"motion photo" * 99, PLAN), read_pixels(body, PLAN))
