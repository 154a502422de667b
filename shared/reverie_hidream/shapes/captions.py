"""Captions of scenes, in several phrasings, and what a caption promises.

Clean captions say what is in the picture, not always all of it. `training_caption` also spoils a share of them with
words that the model cannot know, so that it learns to ignore what it does not understand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from reverie_hidream.randomness import Draw
from reverie_hidream.shapes.world import COLOURS, SHAPES, SIZES, Scene, Thing

EMPTY_SHARE = 0.1
"""Share of training captions that are empty: what guidance steers away from."""

SPOILT_SHARE = 0.35
"""Share of the other training captions with words that are added, swapped, dropped or replaced."""

RESERVED_WORDS = ("zorp",)
"""Never invented: what an example teaches must be new."""

CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
"""Of invented words."""

FILLERS = ("nice", "beautiful", "simple", "very", "please", "detailed", "good", "lovely", "photo", "plain", "tiny art")

_SIZE_SHARE = 0.7
_POSITION_SHARE = 0.7
_POSITION_WORDS = ("top", "bottom", "left", "right", "centre", "middle")
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class ThingClaim:
    """What a caption promises of one object; None is not said."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Claims:
    """What a caption promises; None is not said."""

    background: str | None = None
    things: tuple[ThingClaim, ...] = ()
    """In the order of `arrangement`, the left one or the upper one first."""
    row: str | None = None
    """Of a single object."""
    column: str | None = None
    arrangement: str | None = None
    """Of two: `beside`, `above`, or None."""


def caption_of(scene: Scene, draw: Draw, index: int) -> str:
    """A clean caption; which words it takes and what it leaves out are functions of the draw and the index."""
    generator = draw.generator(index, 0)
    return _pair_caption(scene, generator) if len(scene.things) == 2 else _single_caption(scene, generator)


def training_caption(scene: Scene, draw: Draw, step: int, position: int) -> str:
    """A caption as training sees it at one place of one step: clean, spoilt or empty."""
    generator = draw.generator(step, position)
    if generator.random() < EMPTY_SHARE:
        return ""
    clean = _pair_caption(scene, generator) if len(scene.things) == 2 else _single_caption(scene, generator)
    return spoil(clean, generator) if generator.random() < SPOILT_SHARE else clean


def spoil(caption: str, generator: np.random.Generator) -> str:
    """Add, swap, drop or replace a word or two."""
    words = caption.split()
    for _ in range(1 + int(generator.integers(2))):
        words = _SPOILERS[int(generator.integers(len(_SPOILERS)))](words, generator)
    return " ".join(words)


def invented_word(generator: np.random.Generator) -> str:
    """A word of one to three syllables that means nothing."""
    word = ""
    for _ in range(1 + int(generator.integers(3))):
        word += _letter(CONSONANTS, generator) + _letter(VOWELS, generator)
        word += _letter(CONSONANTS, generator) if generator.random() < 0.5 else ""
    is_known = word in RESERVED_WORDS or word in WORLD_WORDS
    return invented_word(generator) if is_known else word


def claims_of(scene: Scene) -> Claims:
    """Everything that could be said about a scene."""
    things = tuple(
        ThingClaim(shape=thing.shape, colour=thing.colour, size=thing.size if len(scene.things) == 1 else None)
        for thing in scene.things
    )
    if len(things) == 2:
        arrangement = "beside" if scene.is_side_by_side else "above"
        return Claims(background=scene.background, things=things, arrangement=arrangement)
    only = scene.things[0]
    return Claims(background=scene.background, things=things, row=only.row, column=only.column)


def parse_caption(caption: str) -> Claims:
    """Read a caption; words without a meaning here are passed over."""
    reader = _Reader()
    words = _WORD.findall(caption.lower())
    for word, following in zip(words, [*words[1:], ""], strict=True):
        reader.read(word, following)
    return reader.finish()


@dataclass(kw_only=True, slots=True)
class _Reader:
    """Goes through a caption word by word."""

    things: list[ThingClaim] = field(default_factory=list)
    places: set[str] = field(default_factory=set)
    background: str | None = None
    arrangement: str | None = None
    is_reversed: bool = False
    size: str | None = None
    colour: str | None = None
    expects_background: bool = False

    def read(self, word: str, following: str) -> None:
        if word in ("left", "right") and following == "of":
            self._relate("beside", is_reversed=word == "right")
        elif word in ("above", "below"):
            self._relate("above", is_reversed=word == "below")
        elif word in ("on", "against"):
            self.expects_background = True
        elif word in _POSITION_WORDS:
            self.places.add(word)
            self.expects_background = False
        elif word == "background":
            self._take_background(self.background or self.colour)
        elif word in COLOURS:
            self._colour(word)
        elif word in SIZES:
            self.size = word
        elif word in SHAPES:
            self._close(word)

    def finish(self) -> Claims:
        if self.colour or self.size:
            self._close(None)
        things = tuple(reversed(self.things) if self.is_reversed else self.things)
        row, column = self._place() if len(things) < 2 else (None, None)
        return Claims(background=self.background, things=things, row=row, column=column, arrangement=self.arrangement)

    def _relate(self, arrangement: str, *, is_reversed: bool) -> None:
        if self.colour:
            self._close(None)
        self.arrangement, self.is_reversed = arrangement, is_reversed

    def _colour(self, word: str) -> None:
        if self.expects_background:
            if self.colour:
                self._close(None)
            self.background, self.expects_background = word, False
        else:
            self.colour = word

    def _take_background(self, name: str | None) -> None:
        if self.background is None:
            self.colour = None
        self.background, self.expects_background = name, False

    def _close(self, shape: str | None) -> None:
        self.things.append(ThingClaim(shape=shape, colour=self.colour, size=self.size))
        self.colour = self.size = None

    def _place(self) -> tuple[str | None, str | None]:
        if not self.places:
            return None, None
        row = next((word for word in ("top", "bottom") if word in self.places), "middle")
        column = next((word for word in ("left", "right") if word in self.places), "centre")
        return row, column


def _single_caption(scene: Scene, generator: np.random.Generator) -> str:
    thing = scene.things[0]
    size = f"{thing.size} " if generator.random() < _SIZE_SHARE else ""
    name = f"{size}{thing.colour} {thing.shape}"
    place = _place_phrase(thing, generator) if generator.random() < _POSITION_SHARE else ""
    return _phrase(_SINGLE_PHRASES, generator).format(thing=name, place=place, ground=scene.background).strip()


def _place_phrase(thing: Thing, generator: np.random.Generator) -> str:
    if thing.row == "middle" and thing.column == "centre":
        return _phrase((" in the centre", " in the middle"), generator)
    if thing.row == "middle":
        return _phrase((" on the {}", " at the {}"), generator).format(thing.column)
    if thing.column == "centre":
        return f" at the {thing.row}"
    return _phrase((" in the {} {} corner", " at the {} {}"), generator).format(thing.row, thing.column)


def _pair_caption(scene: Scene, generator: np.random.Generator) -> str:
    first, second = (f"{thing.colour} {thing.shape}" for thing in scene.things)
    relation, opposite = ("left of", "right of") if scene.is_side_by_side else ("above", "below")
    if generator.random() < 0.3:
        first, second, relation = second, first, opposite
    if generator.random() < 0.2:
        relation = "and"
    phrase = _phrase(_PAIR_PHRASES, generator)
    return phrase.format(first=first, second=second, relation=relation, ground=scene.background)


_SINGLE_PHRASES = (
    "a {thing}{place} on a {ground} background",
    "a {thing} on {ground}{place}",
    "{thing}{place}, {ground} background",
    "{ground} background with a {thing}{place}",
    "a picture of a {thing}{place} on {ground}",
    "there is a {thing}{place} against {ground}",
)
_PAIR_PHRASES = (
    "a {first} {relation} a {second} on a {ground} background",
    "a {first} {relation} a {second} on {ground}",
    "{first} {relation} {second}, {ground} background",
    "{ground} background with a {first} {relation} a {second}",
    "a picture of a {first} {relation} a {second} on {ground}",
)
_WRITTEN = " ".join([*_SINGLE_PHRASES, *_PAIR_PHRASES]).replace("{", "<").replace("}", ">")
WORLD_WORDS = frozenset(
    _WORD.findall(re.sub("<[a-z]*>", " ", _WRITTEN))
    + _WORD.findall(" ".join([*FILLERS, *COLOURS, *SHAPES, *SIZES, *_POSITION_WORDS, "of above below and corner"]))
)
"""Every word that a clean caption or filler can have."""
_MEANINGFUL = (*COLOURS, *SHAPES, *SIZES)


def _phrase(phrases: Sequence[str], generator: np.random.Generator) -> str:
    return phrases[int(generator.integers(len(phrases)))]


def _letter(letters: str, generator: np.random.Generator) -> str:
    return letters[int(generator.integers(len(letters)))]


def _add_filler(words: list[str], generator: np.random.Generator) -> list[str]:
    place = int(generator.integers(len(words) + 1))
    return [*words[:place], _phrase(FILLERS, generator), *words[place:]]


def _add_invented(words: list[str], generator: np.random.Generator) -> list[str]:
    place = int(generator.integers(len(words) + 1))
    return [*words[:place], invented_word(generator), *words[place:]]


def _drop(words: list[str], generator: np.random.Generator) -> list[str]:
    place = int(generator.integers(len(words)))
    return [*words[:place], *words[place + 1 :]] if len(words) > 1 else words


def _swap(words: list[str], generator: np.random.Generator) -> list[str]:
    if len(words) < 2:
        return words
    place = int(generator.integers(len(words) - 1))
    return [*words[:place], words[place + 1], words[place], *words[place + 2 :]]


def _replace(words: list[str], generator: np.random.Generator) -> list[str]:
    """Put an invented word in the place of one that says something."""
    places = [place for place, word in enumerate(words) if word.strip(",") in _MEANINGFUL]
    if not places:
        return words
    place = places[int(generator.integers(len(places)))]
    return [*words[:place], invented_word(generator), *words[place + 1 :]]


_SPOILERS: tuple[Callable[[list[str], np.random.Generator], list[str]], ...] = (
    _add_filler,
    _add_invented,
    _drop,
    _swap,
    _replace,
)
