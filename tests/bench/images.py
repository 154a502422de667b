"""Image decoding and resizing: the VAE service's path against Pillow's LANCZOS, on large photographs, one thread."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from reverie_vae.images import ResizeCrop, read_pixels, read_pixels_with_pillow

from tests.bench.report import Figure, interleaved, median_ratio

PHOTOS = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "photos"
SOURCE_SIZES = ((3000, 2000), (4000, 3000))
ROUNDS = 7


def measure() -> Iterator[Figure]:
    """Yield the ratio of rates, ours / Pillow, for photographs brought to 1024 x 1024."""
    torch.set_num_threads(1)
    for width, height in SOURCE_SIZES:
        body = _photograph(width, height)
        edge = round(1024 * width / height)
        plan = ResizeCrop(
            resize_width=edge, resize_height=1024, crop_left=(edge - 1024) // 2, crop_top=0, width=1024, height=1024
        )
        ours, pillow = interleaved(
            [partial(read_pixels, body, plan), partial(read_pixels_with_pillow, body, plan)],
            rounds=ROUNDS,
        )
        yield Figure(
            name=f"JPEG {width}x{height} to 1024x1024, rate against Pillow LANCZOS",
            value=median_ratio(pillow, ours),
            unit="ratio",
            at_least=2.0,
        )


def _photograph(width: int, height: int) -> bytes:
    with Image.open(PHOTOS / "coffee.jpg") as photo:
        large = photo.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    large.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
