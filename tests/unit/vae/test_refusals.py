"""Files that cannot be used: each is refused by name, and nothing but a refusal ever comes out of a damaged file."""

import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image
from reverie_common.storage import MemoryStore
from reverie_vae.files import ImageFile, fetch_image, require_stored
from reverie_vae.images import ResizeCrop, inspect_image, read_pixels, refuse_large_file
from reverie_vae.limits import MAX_FILE_BYTES
from reverie_vae.rejections import ImageRejectedError, Reason

Picture = Callable[..., Image.Image]
Save = Callable[..., bytes]

PLAN = ResizeCrop(resize_width=64, resize_height=64, crop_left=0, crop_top=0, width=64, height=64)
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"]


def refusal(body: bytes, *, max_pixels: int = 1_000_000) -> ImageRejectedError:
    """The refusal of a file, the same from inspecting and from reading it."""
    with pytest.raises(ImageRejectedError) as inspected:
        inspect_image(body, max_pixels=max_pixels)
    with pytest.raises(ImageRejectedError) as read:
        read_pixels(body, PLAN, max_pixels=max_pixels)
    assert (inspected.value.reason, inspected.value.message) == (read.value.reason, read.value.message)
    return inspected.value


def test_refuses_an_empty_file() -> None:
    assert refusal(b"").reason is Reason.EMPTY


@pytest.mark.parametrize("body", [b"\x00", b"hello", b"%PDF-1.7\n" * 20, b"<svg/>", bytes(5000)])
def test_refuses_what_is_no_image(body: bytes) -> None:
    assert refusal(body).reason is Reason.NOT_AN_IMAGE


def test_names_the_format_that_phones_use() -> None:
    error = refusal(b"\x00\x00\x00\x18ftypheic" + bytes(500))
    assert error.reason is Reason.NOT_AN_IMAGE
    assert "HEIC" in error.message


def test_refuses_formats_that_pillow_would_open(picture: Picture, save: Save) -> None:
    assert refusal(save(picture(), "PPM")).reason is Reason.NOT_AN_IMAGE
    assert refusal(save(picture(), "ICO")).reason is Reason.NOT_AN_IMAGE


@pytest.mark.parametrize("value", [np.int32(400_000), np.float32(0.5)])
def test_refuses_numbers_without_a_meaning_in_8_bits(save: Save, value: np.generic) -> None:
    error = refusal(save(Image.fromarray(np.full((64, 64), value)), "TIFF"))
    assert error.reason is Reason.NOT_AN_IMAGE
    assert "16 bit" in error.message


@pytest.mark.parametrize("format_name", FORMATS)
def test_refuses_a_truncated_file_wherever_it_ends(picture: Picture, save: Save, format_name: str) -> None:
    body = save(picture(), format_name)
    # A GIF or TIFF file is whole without its last bytes; a few bytes are no signature yet.
    for size in (*range(15, 200, 7), len(body) // 3, len(body) // 2, len(body) - 200):
        assert refusal(body[:size]).reason is Reason.CORRUPT


@pytest.mark.parametrize("size", [-1, -2, -20])
@pytest.mark.parametrize("format_name", ["JPEG", "PNG"])
def test_refuses_a_file_that_lacks_its_last_bytes(picture: Picture, save: Save, format_name: str, size: int) -> None:
    assert refusal(save(picture(), format_name)[:size]).reason is Reason.CORRUPT


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_refuses_jpeg_damage_that_pillow_lets_pass(picture: Picture, save: Save, mode: str) -> None:
    body = save(picture().convert(mode), "JPEG")
    without_last_rows = body[:-202] + body[-2:]
    Image.open(io.BytesIO(without_last_rows)).load()
    assert refusal(without_last_rows).reason is Reason.CORRUPT


def test_refuses_png_damage_that_pillow_lets_pass(picture: Picture, save: Save) -> None:
    body = bytearray(save(picture(), "PNG"))
    body[-20] ^= 1
    assert refusal(bytes(body)).reason is Reason.CORRUPT


@pytest.mark.parametrize("format_name", FORMATS)
def test_damage_anywhere_is_refused_or_harmless(picture: Picture, save: Save, format_name: str) -> None:
    body, generator = save(picture(64, 64), format_name), np.random.default_rng(3)
    for position in generator.integers(0, min(len(body), 400), 60):
        damaged = bytearray(body)
        damaged[position] ^= int(generator.integers(1, 256))
        with suppress(ImageRejectedError):
            inspect_image(bytes(damaged), max_pixels=1_000_000)


def test_refuses_too_many_pixels_by_the_header_alone() -> None:
    # 10^10 pixels in 57 bytes: decoding it would fail, and opening it would make Pillow warn of a bomb.
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    body = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    body += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    error = refusal(body, max_pixels=100_000_000)
    assert error.reason is Reason.TOO_MANY_PIXELS
    assert "100000x100000 = 10000000000 pixels, the limit is 100000000" in error.message


def test_the_pixel_limit_itself_is_allowed(picture: Picture, save: Save) -> None:
    body = save(picture(80, 64), "PNG")
    assert inspect_image(body, max_pixels=80 * 64).width == 80
    assert refusal(body, max_pixels=80 * 64 - 1).reason is Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize("format_name", ["GIF", "PNG", "WEBP", "TIFF"])
def test_refuses_more_than_one_frame(picture: Picture, save: Save, format_name: str) -> None:
    frames = [picture(64, 64, seed) for seed in range(3)]
    error = refusal(save(frames[0], format_name, save_all=True, append_images=frames[1:]))
    assert error.reason is Reason.ANIMATED
    assert "3 frames" in error.message


def test_refuses_a_file_over_256_mib_unread() -> None:
    refuse_large_file(MAX_FILE_BYTES)
    with pytest.raises(ImageRejectedError) as error:
        refuse_large_file(MAX_FILE_BYTES + 1)
    assert error.value.reason is Reason.TOO_MANY_BYTES
    assert "268435457 bytes, the limit is 268435456" in error.value.message


@pytest.fixture
def stored(memory_store: MemoryStore) -> ImageFile:
    """A file of four bytes whose reference is right."""
    memory_store.create("v1/image/x", b"abcd")
    sha256 = "88d4266fd4e6338d13b845fcf289579d209c897823b9217da3e161936f031589"
    return ImageFile(key="v1/image/x", sha256=sha256, size_bytes=4)


def test_fetches_what_the_reference_says(memory_store: MemoryStore, stored: ImageFile) -> None:
    require_stored(memory_store, stored)
    assert fetch_image(memory_store, stored) == b"abcd"


def test_refuses_a_missing_object(memory_store: MemoryStore, stored: ImageFile) -> None:
    memory_store.delete(stored.key)
    for ask in (fetch_image, require_stored):
        with pytest.raises(ImageRejectedError) as error:
            ask(memory_store, stored)
        assert error.value.reason is Reason.MISSING


def test_refuses_other_bytes_than_the_references(memory_store: MemoryStore, stored: ImageFile) -> None:
    memory_store.replace(stored.key, b"abcdef")
    for ask in (fetch_image, require_stored):
        with pytest.raises(ImageRejectedError) as error:
            ask(memory_store, stored)
        assert error.value.reason is Reason.DIGEST_MISMATCH
