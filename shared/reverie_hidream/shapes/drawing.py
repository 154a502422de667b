"""Scenes as pictures: anti-aliased by taking sixteen samples of every pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from reverie_hidream.shapes.world import Scene, Thing

SAMPLES_PER_SIDE = 4

Picture = npt.NDArray[np.uint8]
"""(H, W, 3), 0 to 255."""
_Grid = npt.NDArray[np.float64] | npt.NDArray[np.float32]

_ARM_WIDTH = 0.36
_RING_HOLE = 0.55


def draw_scene(scene: Scene) -> Picture:
    """The picture of a scene, (H, W, 3) uint8."""
    canvas = np.empty((scene.height, scene.width, 3), dtype=np.float32)
    canvas[:] = scene.rgb
    for thing in scene.things:
        _paint(canvas, thing)
    return np.rint(canvas).astype(np.uint8)


def coverage(shape: str, radius: float, offset: tuple[float, float], num_pixels: int) -> npt.NDArray[np.float32]:
    """How much of every pixel of a square a shape covers.

    Args:
        shape: one of SHAPES.
        radius: in pixels.
        offset: (x, y) of the centre, in pixels from the upper left corner of the square.
        num_pixels: side of the square.

    Returns:
        (num_pixels, num_pixels) float32, 0 to 1.
    """
    ticks = (np.arange(num_pixels * SAMPLES_PER_SIDE, dtype=np.float32) + 0.5) / SAMPLES_PER_SIDE
    u, v = (ticks[None, :] - offset[0]) / radius, (ticks[:, None] - offset[1]) / radius
    inside = INSIDE[shape](u, v).astype(np.float32)
    blocks = inside.reshape(num_pixels, SAMPLES_PER_SIDE, num_pixels, SAMPLES_PER_SIDE)
    covered: npt.NDArray[np.float32] = blocks.mean(axis=(1, 3))
    return covered


def _paint(canvas: npt.NDArray[np.float32], thing: Thing) -> None:
    left, top = int(thing.x - thing.radius) - 1, int(thing.y - thing.radius) - 1
    side = int(2 * thing.radius) + 4
    covered = coverage(thing.shape, thing.radius, (thing.x - left, thing.y - top), side)
    # A margin keeps things inside the picture, but not the box around them.
    rows, columns = slice(max(top, 0), top + side), slice(max(left, 0), left + side)
    area = canvas[rows, columns]
    share = covered[max(-top, 0) :, max(-left, 0) :][: area.shape[0], : area.shape[1], None]
    area += share * (np.array(thing.rgb, dtype=np.float32) - area)


def _is_in_circle(u: _Grid, v: _Grid) -> npt.NDArray[np.bool_]:
    return u**2 + v**2 <= 1


def _is_in_ring(u: _Grid, v: _Grid) -> npt.NDArray[np.bool_]:
    distance = u**2 + v**2
    return (distance <= 1) & (distance >= _RING_HOLE**2)


def _is_in_square(u: _Grid, v: _Grid) -> npt.NDArray[np.bool_]:
    return (np.abs(u) <= 0.9) & (np.abs(v) <= 0.9)


def _is_in_triangle(u: _Grid, v: _Grid) -> npt.NDArray[np.bool_]:
    return (v <= 0.9) & (2 * np.abs(u) <= v + 1)


def _is_in_diamond(u: _Grid, v: _Grid) -> npt.NDArray[np.bool_]:
    return np.abs(u) + np.abs(v) <= 1


def _is_in_cross(u: _Grid, v: _Grid) -> npt.NDArray[np.bool_]:
    across, along = np.abs(u), np.abs(v)
    return ((across <= _ARM_WIDTH) & (along <= 1)) | ((along <= _ARM_WIDTH) & (across <= 1))


INSIDE: Mapping[str, Callable[[_Grid, _Grid], npt.NDArray[np.bool_]]] = {
    "circle": _is_in_circle,
    "square": _is_in_square,
    "triangle": _is_in_triangle,
    "diamond": _is_in_diamond,
    "cross": _is_in_cross,
    "ring": _is_in_ring,
}
"""Whether points are inside a shape of radius 1 around (0, 0); u to the right, v downwards."""
