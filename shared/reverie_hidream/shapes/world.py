"""The world: scenes of one or two plain shapes on a plain ground, endless and seeded.

A scene is a pure function of (seed, index). A tenth of all combinations of shapes, colours and background, chosen by
hash, is held out: training never sees them, evaluation sees nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from reverie_hidream.randomness import Draw

Colour = tuple[int, int, int]

COLOURS: Mapping[str, Colour] = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 70, 210),
    "yellow": (245, 215, 60),
    "purple": (140, 50, 170),
    "cyan": (90, 215, 225),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
"""Of shapes and backgrounds; RGB, each at least 100 away from all others."""

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = ("small", "large")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")

CANVAS_PIXELS = 128
"""Longest side of a picture: 64 patches, the canvas of the checkpoint."""

PICTURE_SIZES: Mapping[tuple[int, int], int] = {
    (64, 64): 8,
    (96, 64): 2,
    (64, 96): 2,
    (96, 96): 2,
    (128, 64): 1,
    (64, 128): 1,
    (128, 96): 1,
    (96, 128): 1,
    (128, 128): 1,
}
"""(width, height) in pixels, and how often each is drawn beside the others."""

PAIR_SHARE = 0.25
"""Share of scenes with two objects."""

HELD_OUT_IN = 10
"""One combination in so many is held out."""

_RADII: Mapping[str, tuple[float, float]] = {"small": (0.15, 0.18), "large": (0.26, 0.30)}
_PAIR_RADII = (0.17, 0.20)
_MARGIN = 0.04
_COLOUR_JITTER = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """One object."""

    shape: str
    """One of SHAPES."""
    colour: str
    """A name in COLOURS."""
    rgb: Colour
    """The colour that it is drawn in, a little off the name's."""
    size: str
    """One of SIZES."""
    row: str
    """One of ROWS."""
    column: str
    """One of COLUMNS."""
    x: float
    """Centre, in pixels from the left edge."""
    y: float
    """Centre, in pixels from the upper edge."""
    radius: float
    """Half of the side of the box around the shape, in pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """What a picture shows."""

    width: int
    """Pixels, a multiple of 16."""
    height: int
    """Pixels, a multiple of 16."""
    background: str
    """A name in COLOURS, other than those of the things."""
    rgb: Colour
    """The colour that the background is drawn in."""
    things: tuple[Thing, ...]
    """One, or two: the left one or the upper one first."""

    @property
    def is_side_by_side(self) -> bool:
        """Whether two things are next to each other and not one above the other."""
        return len(self.things) == 2 and self.things[0].column != self.things[1].column

    @property
    def is_held_out(self) -> bool:
        """Whether training must not see this combination of shapes, colours and background."""
        names = [self.background, *(f"{thing.colour} {thing.shape}" for thing in self.things)]
        digest = hashlib.sha256("/".join(names).encode()).digest()
        return int.from_bytes(digest[:4], "little") % HELD_OUT_IN == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """All scenes of a seed. Thread-safe."""

    seed: int
    picture_size: tuple[int, int] | None = None
    """Width and height of every scene; None mixes PICTURE_SIZES."""

    def training_scene(self, index: int) -> Scene:
        """Scene `index` of training, from 0: never a held-out combination."""
        return self._scene("training", index, is_held_out=False)

    def unseen_scene(self, index: int) -> Scene:
        """Scene `index` of evaluation, from 0: always a held-out combination."""
        return self._scene("unseen", index, is_held_out=True)

    def _scene(self, part: str, index: int, *, is_held_out: bool) -> Scene:
        generator = Draw(seed=self.seed, stream=f"shapes/{part}").generator(index, 0)
        return next(scene for scene in self._scenes(generator) if scene.is_held_out == is_held_out)

    def _scenes(self, generator: np.random.Generator) -> Iterator[Scene]:
        while True:
            size = self.picture_size or _picture_size(generator)
            yield _pair(generator, *size) if generator.random() < PAIR_SHARE else _single(generator, *size)


def _picture_size(generator: np.random.Generator) -> tuple[int, int]:
    weights = np.array(list(PICTURE_SIZES.values()), dtype=float)
    return list(PICTURE_SIZES)[int(generator.choice(len(weights), p=weights / weights.sum()))]


def _single(generator: np.random.Generator, width: int, height: int) -> Scene:
    background, colour = _names(generator, 2)
    size = _one_of(generator, SIZES)
    radius = float(generator.uniform(*_RADII[size])) * min(width, height)
    row, column = _one_of(generator, ROWS), _one_of(generator, COLUMNS)
    thing = Thing(
        shape=_one_of(generator, SHAPES),
        colour=colour,
        rgb=_jittered(generator, colour),
        size=size,
        row=row,
        column=column,
        x=_place(generator, COLUMNS.index(column), width, radius),
        y=_place(generator, ROWS.index(row), height, radius),
        radius=radius,
    )
    return _on_ground(generator, width, height, background, (thing,))


def _pair(generator: np.random.Generator, width: int, height: int) -> Scene:
    """Two things in the two halves of the longer side, or of either side of a square."""
    background, first, second = _names(generator, 3)
    is_side_by_side = width > height or (width == height and bool(generator.random() < 0.5))
    things = []
    for place, colour in ((0, first), (2, second)):
        radius = float(generator.uniform(*_PAIR_RADII)) * min(width, height)
        row, column = ("middle", COLUMNS[place]) if is_side_by_side else (ROWS[place], "centre")
        things.append(
            Thing(
                shape=_one_of(generator, SHAPES),
                colour=colour,
                rgb=_jittered(generator, colour),
                size="small",
                row=row,
                column=column,
                x=_place(generator, COLUMNS.index(column), width, radius),
                y=_place(generator, ROWS.index(row), height, radius),
                radius=radius,
            )
        )
    return _on_ground(generator, width, height, background, tuple(things))


def _on_ground(
    generator: np.random.Generator, width: int, height: int, background: str, things: tuple[Thing, ...]
) -> Scene:
    rgb = _jittered(generator, background)
    return Scene(width=width, height=height, background=background, rgb=rgb, things=things)


def _names(generator: np.random.Generator, num_names: int) -> list[str]:
    names = list(COLOURS)
    return [names[place] for place in generator.choice(len(names), size=num_names, replace=False)]


def _one_of(generator: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(generator.integers(len(options)))]


def _jittered(generator: np.random.Generator, name: str) -> Colour:
    offsets = generator.integers(-_COLOUR_JITTER, _COLOUR_JITTER + 1, size=3)
    red, green, blue = (
        int(np.clip(level + offset, 0, 255)) for level, offset in zip(COLOURS[name], offsets, strict=True)
    )
    return red, green, blue


def _place(generator: np.random.Generator, third: int, length: int, radius: float) -> float:
    """Centre along one side: close to the middle for 1, close to either end for 0 and 2."""
    reach = length / 2 - radius - _MARGIN * length
    if third == 1:
        return length / 2 + float(generator.uniform(-0.03, 0.03)) * length
    return length / 2 + (third - 1) * float(generator.uniform(0.85, 1.0)) * reach
