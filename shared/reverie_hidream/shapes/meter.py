"""The meter: reads count, shapes, colours, sizes, positions and background from the pixels of a picture.

It knows the colours by a table and the shapes by how they fill a box; no model and no learning is in it. Pixels that
differ from the border's colour are put together into connected components; each is compared with every shape drawn at
the component's area and centre of mass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from reverie_hidream.shapes.captions import Claims, ThingClaim
from reverie_hidream.shapes.drawing import Picture, coverage
from reverie_hidream.shapes.world import COLOURS, SHAPES

MIN_OVERLAP = 0.7
"""Intersection over union with the best shape, below which a component has no shape."""

_MIN_CONTRAST = 60.0
_MIN_AREA = 0.015
_SMALL_RADIUS = 0.22
_CENTRE_REACH = 0.083
_TEMPLATE_PIXELS = 256

_Floats = npt.NDArray[np.float32]
_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class ThingReading:
    """One object as it is seen."""

    shape: str | None
    """One of SHAPES; None where it looks like none."""
    overlap: float
    """Intersection over union with that shape, or the best one."""
    colour: str
    size: str
    row: str
    column: str
    x: float
    """Centre, in pixels."""
    y: float
    radius: float
    """Pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A picture as it is seen."""

    background: str
    things: tuple[ThingReading, ...]
    """From left to right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Which promises of a caption a picture keeps; what is not promised is kept."""

    background: bool
    count: bool
    shape: bool
    colour: bool
    size: bool
    position: bool

    @property
    def all_right(self) -> bool:
        """Whether every promise is kept."""
        return self.background and self.count and self.shape and self.colour and self.size and self.position


def read_picture(picture: Picture) -> Reading:
    """Read a picture, (H, W, 3) uint8."""
    pixels = picture.astype(np.float32)
    background, ground = _background(pixels)
    contrast = np.linalg.norm(pixels - ground, axis=-1)
    min_area = _MIN_AREA * min(picture.shape[:2]) ** 2
    masks = [mask for mask in components(contrast > _MIN_CONTRAST) if mask.sum() >= min_area]
    things = [_thing(pixels, ground, contrast, mask) for mask in masks]
    return Reading(background=background, things=tuple(sorted(things, key=lambda thing: thing.x)))


def score(claims: Claims, reading: Reading) -> Score:
    """Compare what a caption promises with what is seen."""
    has_count = len(claims.things) in (0, len(reading.things))
    pairs = _paired(claims, reading) if has_count else []
    return Score(
        background=claims.background in (None, reading.background),
        count=has_count,
        shape=has_count and all(claim.shape in (None, thing.shape) for claim, thing in pairs),
        colour=has_count and all(claim.colour in (None, thing.colour) for claim, thing in pairs),
        size=has_count and all(claim.size in (None, thing.size) for claim, thing in pairs),
        position=has_count and _is_in_place(claims, reading),
    )


def components(mask: _Mask) -> list[_Mask]:
    """Connected components of a mask; neighbours may be diagonal."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        # Labels travel along rows and columns at once: a doubling in place of one pixel at a time.
        spread = np.where(mask, _largest_nearby(labels), 0)
        spread = np.where(mask, np.maximum(spread, np.concatenate([[0], spread.ravel()])[spread]), 0)
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels) if label]
        labels = spread


def _largest_nearby(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    padded = np.pad(labels, ((1, 1), (0, 0)))
    tall = np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:])
    padded = np.pad(tall, ((0, 0), (1, 1)))
    largest: npt.NDArray[np.int64] = np.maximum(np.maximum(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])
    return largest


def _background(pixels: _Floats) -> tuple[str, _Floats]:
    """The name that most of the border has, and the colour that the border is where it has it."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    names = _nearest(border)
    most = int(np.bincount(names, minlength=len(COLOURS)).argmax())
    ground: _Floats = np.median(border[names == most], axis=0)
    return list(COLOURS)[most], ground


def _nearest(pixels: _Floats) -> npt.NDArray[np.intp]:
    table = np.array(list(COLOURS.values()), dtype=np.float32)
    nearest: npt.NDArray[np.intp] = np.linalg.norm(pixels[:, None] - table, axis=-1).argmin(axis=1)
    return nearest


def _thing(pixels: _Floats, ground: _Floats, contrast: _Floats, mask: _Mask) -> ThingReading:
    inner = mask & (contrast >= np.median(contrast[mask]))
    ink: _Floats = np.median(pixels[inner], axis=0)
    shares, (left, top) = _cropped(_shares(pixels, ground, ink) * _grown(mask))
    shape, overlap, (x, y, radius) = _shape(shares)
    x, y = x + left, y + top
    height, width = mask.shape
    return ThingReading(
        shape=shape if overlap >= MIN_OVERLAP else None,
        overlap=overlap,
        colour=list(COLOURS)[int(_nearest(ink[None])[0])],
        size="small" if radius < _SMALL_RADIUS * min(height, width) else "large",
        row=_third(y / height, ("top", "middle", "bottom")),
        column=_third(x / width, ("left", "centre", "right")),
        x=x,
        y=y,
        radius=radius,
    )


def _shares(pixels: _Floats, ground: _Floats, ink: _Floats) -> _Floats:
    """How much of every pixel is the thing's: 0 in the background's colour, 1 in its own. (H, W)"""
    way = ink - ground
    shares: _Floats = np.clip((pixels - ground) @ way / (way @ way), 0.0, 1.0)
    return shares


def _cropped(shares: _Floats) -> tuple[_Floats, tuple[int, int]]:
    """The box around a thing, with room for shapes that fit it badly, and its upper left corner (x, y)."""
    rows, columns = np.flatnonzero(shares.any(axis=1)), np.flatnonzero(shares.any(axis=0))
    room = max(rows[-1] - rows[0], columns[-1] - columns[0]) // 2
    top, left = max(0, int(rows[0] - room)), max(0, int(columns[0] - room))
    return shares[top : rows[-1] + room + 1, left : columns[-1] + room + 1], (left, top)


def _grown(mask: _Mask) -> _Mask:
    """With the faint edge around it."""
    return _largest_nearby(mask.astype(np.int64)) > 0


def _shape(shares: _Floats) -> tuple[str, float, tuple[float, float, float]]:
    """The shape that fits best, its overlap, and the x, y and radius that it has then."""
    fits = {shape: _fit(shape, shares) for shape in SHAPES}
    best = max(fits, key=lambda shape: fits[shape][0])
    overlap, place = fits[best]
    return best, overlap, place


def _fit(shape: str, shares: _Floats) -> tuple[float, tuple[float, float, float]]:
    area, centre = float(shares.sum()), _centre_of_mass(shares)
    unit_area, unit_centre = _unit(shape)
    radius = (area / unit_area) ** 0.5
    x, y = centre[0] - radius * unit_centre[0], centre[1] - radius * unit_centre[1]
    drawn = coverage(shape, radius, (x, y), max(shares.shape))[: shares.shape[0], : shares.shape[1]]
    overlap = np.minimum(drawn, shares).sum() / np.maximum(drawn, shares).sum()
    return float(overlap), (x, y, radius)


@cache
def _unit(shape: str) -> tuple[float, tuple[float, float]]:
    """Area and centre of mass of a shape of radius 1."""
    radius = _TEMPLATE_PIXELS / 2
    drawn = coverage(shape, radius, (radius, radius), _TEMPLATE_PIXELS)
    x, y = _centre_of_mass(drawn)
    return float(drawn.sum()) / radius**2, (x / radius - 1.0, y / radius - 1.0)


def _centre_of_mass(shares: _Floats) -> tuple[float, float]:
    total = float(shares.sum())
    x = float((shares.sum(axis=0) * (np.arange(shares.shape[1]) + 0.5)).sum()) / total
    y = float((shares.sum(axis=1) * (np.arange(shares.shape[0]) + 0.5)).sum()) / total
    return x, y


def _third(place: float, names: tuple[str, str, str]) -> str:
    if abs(place - 0.5) <= _CENTRE_REACH:
        return names[1]
    return names[0] if place < 0.5 else names[2]


def _paired(claims: Claims, reading: Reading) -> list[tuple[ThingClaim, ThingReading]]:
    """Which claim is about which thing: by place where the caption says it, else as they fit best."""
    things = _in_order(claims, reading)
    orders: list[Sequence[ThingReading]] = [things]
    if len(claims.things) == 2 and claims.arrangement is None:
        orders.append(things[::-1])
    pairings = [list(zip(claims.things, order, strict=False)) for order in orders]
    return max(pairings, key=lambda pairs: sum(_num_kept(claim, thing) for claim, thing in pairs))


def _num_kept(claim: ThingClaim, thing: ThingReading) -> int:
    return (claim.shape in (None, thing.shape)) + (claim.colour in (None, thing.colour))


def _in_order(claims: Claims, reading: Reading) -> list[ThingReading]:
    if claims.arrangement == "above":
        return sorted(reading.things, key=lambda thing: thing.y)
    return list(reading.things)


def _is_in_place(claims: Claims, reading: Reading) -> bool:
    if claims.arrangement is not None and len(reading.things) == 2:
        first, second = reading.things
        is_beside = abs(first.x - second.x) > abs(first.y - second.y)
        return is_beside == (claims.arrangement == "beside")
    return all(claims.row in (None, thing.row) and claims.column in (None, thing.column) for thing in reading.things)
