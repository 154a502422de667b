"""Pictures and files that the tests of image reading share."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """Draws smooth random pictures; another seed is another picture."""

    def draw(width: int = 200, height: int = 144, seed: int = 0) -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    return draw


@pytest.fixture(scope="session")
def save() -> Callable[..., bytes]:
    """Writes a picture as a file of some format."""

    def write(image: Image.Image, format_name: str, **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, format_name, **options)
        return file.getvalue()

    return write
