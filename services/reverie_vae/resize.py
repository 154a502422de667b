"""Lanczos resizing of 8-bit pixels: Pillow's result within 1 LSB at every size, at a multiple of Pillow's rate.

Pillow filters one axis, rounds to 8 bits, then filters the other. torch does the same several times faster, but with
weights of 16 bits: a pass is off by one in 0.3 % of its values. One such pass does no harm. Errors of the first add up
in the second, so as many rows as it takes get the first pass in Pillow's very bits, by float32 matrix products.
docs/decisions/0005-lanczos-within-one-step.md has the argument and the figures.

Shapes: C channels (1 or 3), H x W input, h x w output, T taps of a filter, L rows of a block of the filter matrix.
Tensors called rows are (H, W, C).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

_ONE = float(1 << 22)
_LOBES = 3.0
# Measured: the products are fastest with 16 columns at a time and rows that fit the cache.
_BLOCK_COLUMNS = 16
_BAND_ROWS = 384
# Above this share of values in doubt (stripes halved: each is a tie) doing all in float64 takes less time.
_MAX_DOUBT = 0.02


def resize_lanczos(pixels: torch.Tensor, *, width: int, height: int) -> torch.Tensor:
    """Resize as `PIL.Image.resize(..., LANCZOS)` does, within 1 LSB.

    Args:
        pixels: (C, H, W) uint8 on the CPU, any strides.
        width: Output width in pixels.
        height: Output height in pixels.

    Returns:
        (C, height, width) uint8.
    """
    if _height_comes_first(pixels, width=width, height=height):
        return _resize(pixels.transpose(1, 2), width=height, height=width).transpose(1, 2)
    return _resize(pixels, width=width, height=height)


def _height_comes_first(pixels: torch.Tensor, *, width: int, height: int) -> bool:
    # Pillow's rule since 13.0 (pull request 9549); the order is visible, as values are rounded and clipped in between.
    return pixels.shape[1] - height > max(0, 2 * (pixels.shape[2] - width))


def _resize(pixels: torch.Tensor, *, width: int, height: int) -> torch.Tensor:
    rows = pixels.permute(1, 2, 0).contiguous()
    if pixels.shape[1] == height or pixels.shape[2] == width:
        return _interpolate(rows, height=height, width=width).permute(2, 0, 1)
    planes = _resize_width(rows, width, _rows_to_be_exact(pixels.shape[1], height))
    return _resize_height(planes, height).permute(1, 0, 2)


def _interpolate(image: torch.Tensor, *, height: int, width: int) -> torch.Tensor:
    """Resize (H, W, C) to (height, width, C) by torch's own filter."""
    # Batch first, then permute: only so are the strides those of channels_last, at twice the rate of all others.
    batch = image[None].permute(0, 3, 1, 2)
    # size goes in as a list of ints; antialias widens the filter as Pillow always does.
    resized = torch.nn.functional.interpolate(batch, [height, width], mode="lanczos", antialias=True)
    return resized[0].permute(1, 2, 0)


def _resize_height(planes: torch.Tensor, height: int) -> torch.Tensor:
    """Resize (H, C, w) to (height, C, w)."""
    # Columns are independent, so what torch is told are channels need not be: it is fastest with 3 or 4 side by side.
    num_columns = planes.shape[1] * planes.shape[2]
    depth = next(depth for depth in (3, 4, 1) if num_columns % depth == 0)
    image = planes.reshape(planes.shape[0], -1, depth)
    return _interpolate(image, height=height, width=image.shape[1]).reshape(height, *planes.shape[1:])


def _rows_to_be_exact(height_in: int, height: int) -> np.ndarray:
    """Choose rows, (H,) bool, so that the first pass's errors in the others cannot become more than one step.

    Such an error is at most 1, so in the second pass they come to at most the sum of their weights. With what the
    second pass adds by itself that sum must stay under 1: then no two rounded values are more than 1 apart.
    """
    filters = _filters(height_in, height)
    weights = np.abs(filters.weights) / _ONE
    rows = np.minimum(filters.first[:, None] + np.arange(weights.shape[1]), height_in - 1)
    limit = max(0.0, 1.0 - _error_of_16_bits(filters.weights / _ONE))
    exact = _every(_SHARES[int(np.searchsorted(_REDUCTIONS, height_in / height))], height_in)
    while True:
        risky = np.where(exact[rows], 0.0, weights)
        too_much = np.flatnonzero(risky.sum(axis=1) > limit)
        if not too_much.size:
            return exact
        exact[rows[too_much, risky[too_much].argmax(axis=1)]] = True


def _error_of_16_bits(weights: np.ndarray) -> float:
    """Bound on what torch's second pass adds: it rounds weights to as many bits as fit the largest into 16."""
    scale = 2.0 ** min(22, int(np.log2((2**15 - 0.5) / weights.max())))
    off = np.rint(weights * scale) / scale - weights
    of_one_sign = max(np.maximum(off, 0.0).sum(axis=1).max(), np.maximum(-off, 0.0).sum(axis=1).max())
    # One weight more may be off by a whole unit: torch may round a tie the other way.
    return 255 * float(of_one_sign + 1.0 / scale)


# Where to start from; what is missing is added. Measured to end with the fewest rows.
_REDUCTIONS = (1.07, 1.15, 2.3)
_SHARES = (2 / 3, 0.6, 0.5, 1 / 3)


def _every(share: float, size: int) -> np.ndarray:
    steps = np.floor(np.arange(size + 1) * share)
    return np.asarray(steps[1:] > steps[:-1])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Filters:
    """Pillow's filter of every output column."""

    first: np.ndarray
    """(w,) int64: the first input column that it reads."""
    weights: np.ndarray
    """(w, T) float64: whole numbers, in units of 2**-22."""

    @property
    def error(self) -> float:
        """Bound on the rounding error of a float32 sum over 8-bit values, in any order, and of what is added to it."""
        num_taps = self.weights.shape[1]
        return float((num_taps + 4) * 2.0**-24 * 255 * np.abs(self.weights).sum(axis=1).max() / _ONE)


def _filters(size_in: int, size_out: int) -> _Filters:
    """Do what Pillow's precompute_coeffs and normalize_coeffs_8bpc do (src/libImaging/Resample.c)."""
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    centers = (np.arange(size_out) + 0.5) * scale
    first = np.maximum((centers - _LOBES * stretch + 0.5).astype(np.int64), 0)
    end = np.minimum((centers + _LOBES * stretch + 0.5).astype(np.int64), size_in)
    columns = first[:, None] + np.arange((end - first).max())
    x = (columns - centers[:, None] + 0.5) * (1.0 / stretch)
    weights = np.sinc(x) * np.sinc(x / _LOBES)
    weights[(x < -_LOBES) | (x >= _LOBES) | (columns >= end[:, None])] = 0.0
    # Summed from left to right, as C does.
    weights /= np.add.accumulate(weights, axis=1)[:, -1:]
    weights *= _ONE
    return _Filters(first=first, weights=np.trunc(weights + np.copysign(0.5, weights)))


def _resize_width(rows: torch.Tensor, width: int, exact: np.ndarray) -> torch.Tensor:
    """Resize (H, W, C) to (H, C, width), the chosen rows in Pillow's bits, the others within one step of them."""
    height, width_in, channels = rows.shape
    resized = np.empty((height, channels, width), np.uint8)
    others = np.flatnonzero(~exact)
    if others.size:
        taken = rows.index_select(0, torch.from_numpy(others))
        resized[others] = _interpolate(taken, height=len(others), width=width).permute(0, 2, 1).numpy()
    product = _BandedProduct(_filters(width_in, width), channels=channels, width_in=width_in)
    chosen = np.flatnonzero(exact)
    for start in range(0, len(chosen), product.num_rows):
        band = chosen[start : start + product.num_rows]
        resized[band] = product.of(rows.index_select(0, torch.from_numpy(band)))
    return torch.from_numpy(resized)


class _BandedProduct:
    """The first pass of some rows, in Pillow's bits; holds the buffers, so it belongs to one image and one thread."""

    def __init__(self, filters: _Filters, *, channels: int, width_in: int) -> None:
        width = len(filters.first)
        self.num_rows = _BAND_ROWS // channels
        self._filters = filters
        blocks = _blocks(filters)
        # Zeros behind each row: the last blocks reach over its end, with weights of zero.
        self._source = torch.zeros(self.num_rows, channels, width_in + blocks.shape[2])
        self._sums = torch.empty(self.num_rows * channels, width)
        # Compared eight values at a time, so there may be a few more than sums.
        self._lowest, self._highest = np.zeros((2, -(-self._sums.numel() // 8) * 8), np.uint8)
        self._steps = list(self._products(blocks))

    def _products(self, blocks: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        source, taken = self._source.flatten(0, 1), blocks.shape[2]
        for left, block in zip(range(0, self._sums.shape[1], _BLOCK_COLUMNS), blocks, strict=True):
            start = int(self._filters.first[left])
            sums = self._sums[:, left : left + _BLOCK_COLUMNS]
            yield source[:, start : start + taken], block[: sums.shape[1]].t(), sums

    def of(self, rows: torch.Tensor) -> np.ndarray:
        """Resize (n, W, C) uint8, n at most num_rows, to (n, C, w)."""
        num_rows, width_in, channels = rows.shape
        self._source[:num_rows, :, :width_in].copy_(rows.permute(0, 2, 1))
        for source, weights, sums in self._steps:
            torch.mm(source, weights, out=sums)
        rounded = self._rounded().reshape(self.num_rows, channels, -1)
        return rounded[:num_rows]

    def _rounded(self) -> np.ndarray:
        """Round the sums, which are a little off, as Pillow rounds the true ones."""
        sums, error = self._sums, self._filters.error
        lowest, highest = self._lowest[: sums.numel()], self._highest[: sums.numel()]
        sums.add_(0.5 - error).clamp_(0.0, 255.5)
        np.copyto(lowest, sums.numpy().reshape(-1), casting="unsafe")
        sums.add_(2 * error)
        np.copyto(highest, sums.numpy().reshape(-1), casting="unsafe")
        # Where both agree the error does not matter; they do but for a few values in ten thousand.
        words = np.flatnonzero(self._lowest.view(np.uint64) != self._highest.view(np.uint64))
        if len(words) > _MAX_DOUBT * len(lowest):
            return self._all_exact()
        word, byte = np.nonzero(self._lowest.reshape(-1, 8)[words] != self._highest.reshape(-1, 8)[words])
        doubtful = words[word] * 8 + byte
        lowest[doubtful] = self._exact(*np.divmod(doubtful, sums.shape[1]))
        return lowest

    def _all_exact(self) -> np.ndarray:
        for source, weights, sums in self._steps:
            sums.copy_(torch.floor(source.double() @ weights.double() + 0.5))
        return np.asarray(self._sums.clamp_(0.0, 255.0).to(torch.uint8).numpy().reshape(-1))

    def _exact(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        source = self._source.flatten(0, 1).numpy()
        taps = self._filters.first[columns][:, None] + np.arange(self._filters.weights.shape[1])
        products = source[rows[:, None], taps].astype(np.float64) * self._filters.weights[columns]
        # Whole numbers under 2**53: exact.
        sums = np.floor((products.sum(axis=1) + _ONE / 2) / _ONE)
        return np.asarray(np.clip(sums, 0, 255).astype(np.uint8))


def _blocks(filters: _Filters) -> torch.Tensor:
    """Cut the matrix of all filters, zero but for a band on its diagonal, into dense (n, _BLOCK_COLUMNS, L) blocks."""
    width, num_taps = filters.weights.shape
    column = np.arange(width)
    offset = filters.first - np.repeat(filters.first[::_BLOCK_COLUMNS], _BLOCK_COLUMNS)[:width]
    shape = (-(-width // _BLOCK_COLUMNS), _BLOCK_COLUMNS, int(offset.max()) + num_taps)
    blocks = np.zeros(shape, np.float32)
    place = offset[:, None] + np.arange(num_taps)
    # Whole numbers of 23 bits over a power of two: exact in float32.
    blocks[(column // _BLOCK_COLUMNS)[:, None], (column % _BLOCK_COLUMNS)[:, None], place] = filters.weights / _ONE
    return torch.from_numpy(blocks)
