"""Decoding and resizing: the VAE service's path against Pillow's LANCZOS, one thread, in a service's environment."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from reverie_common.process import MALLOC_ENVIRONMENT
from reverie_vae.images import ResizeCrop, read_pixels, read_pixels_with_pillow

from tests.bench.report import Figure, interleaved, median_ratio

PHOTOS = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "photos"
# Reductions of 1.3 to 4.
SOURCE_SIZES = ((1775, 1331), (3000, 2000), (4000, 3000), (5461, 4096))
ROUNDS = 9


def measure() -> Iterator[Figure]:
    """Yield the ratio of rates, ours / Pillow, for photographs brought to 1024 x 1024."""
    # A process of its own, since the allocator reads its settings when one starts.
    command = [sys.executable, "-m", "tests.bench.images"]
    child = subprocess.run(command, env={**os.environ, **MALLOC_ENVIRONMENT}, stdout=subprocess.PIPE, check=True)
    for (width, height), ratio in zip(SOURCE_SIZES, json.loads(child.stdout), strict=True):
        yield Figure(
            name=f"JPEG {width}x{height} to 1024x1024, rate against Pillow LANCZOS",
            value=ratio,
            unit="ratio",
            at_least=2.0,
        )


def _ratio(width: int, height: int) -> float:
    body = _photograph(width, height)
    edge = round(1024 * width / height)
    plan = ResizeCrop(
        resize_width=edge, resize_height=1024, crop_left=(edge - 1024) // 2, crop_top=0, width=1024, height=1024
    )
    ours, pillow = interleaved(
        [partial(read_pixels, body, plan), partial(read_pixels_with_pillow, body, plan)], rounds=ROUNDS
    )
    return median_ratio(pillow, ours)


def _photograph(width: int, height: int) -> bytes:
    with Image.open(PHOTOS / "coffee.jpg") as photo:
        large = photo.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    large.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps([_ratio(*size) for size in SOURCE_SIZES]))
