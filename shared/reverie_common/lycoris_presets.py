"""Which modules a LyCORIS preset selects, and the sizes that its algorithms factorise to, as lycoris-lora 4.1.3 does.

Without torch: the control plane counts what a job would train, the worker trains it, and both must mean the same. Class
names are HiDream's own as diffusers spells them, with the names of other HiDream code understood as aliases (spec 4.2).
"""

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

CLASS_ALIASES: Mapping[str, str] = {
    "Attention": "HiDreamAttention",
    "FeedForward": "HiDreamImageFeedForwardSwiGLU",
    "MOEFeedForward": "MOEFeedForwardSwiGLU",
}
"""Names in most LyCORIS configurations, and diffusers' classes (spec 0.1, decision 4)."""

Overrides = TypeVar("Overrides")
OverridesOut = TypeVar("OverridesOut", covariant=True)


class Preset(Protocol[OverridesOut]):
    """What selects modules: `apply_preset` of a LyCORIS configuration."""

    @property
    def target_module(self) -> Sequence[str] | None:
        """Classes, or their aliases, whose Linears are all adapted."""

    @property
    def module_algo_map(self) -> Mapping[str, OverridesOut]:
        """Overrides by class; naming a class also selects it."""

    @property
    def name_algo_map(self) -> Mapping[str, OverridesOut]:
        """Overrides by pattern of the dotted name; they also select."""

    @property
    def target_name(self) -> Sequence[str]:
        """Patterns that select without overrides."""

    @property
    def exclude_name(self) -> Sequence[str]:
        """Patterns of modules that are left out."""

    @property
    def use_fnmatch(self) -> bool:
        """Patterns are fnmatch's; otherwise regular expressions, matched from the start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One module of a model."""

    name: str
    """Dotted, as in `named_modules()`; empty for the model itself."""
    class_name: str
    """diffusers' name; a quantised Linear counts as `Linear`."""
    is_linear: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Selected(Generic[Overrides]):
    """One Linear that is adapted."""

    name: str
    overrides: Overrides | None
    """What its selector overrides; None where it overrides nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection(Generic[Overrides]):
    """All Linears that are adapted, in LyCORIS' order."""

    modules: tuple[Selected[Overrides], ...]
    unmatched: tuple[str, ...]
    """Classes and patterns of the preset, as written, that select nothing."""


def select_modules(nodes: Iterable[Node], preset: Preset[Overrides]) -> Selection[Overrides]:
    """Return what a preset selects among a model's modules, which come parents first, as `named_modules()` gives them.

    A class selects every Linear inside; a name selects that Linear alone and wins over its class; the first selector
    that reaches a Linear decides its overrides (spec 4.2).
    """
    walk = _Walk(list(nodes), preset)
    for node in walk.nodes:
        walk.visit(node)
    return Selection(
        modules=tuple(Selected(name=name, overrides=own) for name, own in walk.selected.items()),
        unmatched=walk.unmatched(),
    )


class _Walk(Generic[Overrides]):
    def __init__(self, nodes: Sequence[Node], preset: Preset[Overrides]) -> None:
        self.nodes = nodes
        self.selected: dict[str, Overrides | None] = {}
        self._preset = preset
        self._by_class = {CLASS_ALIASES.get(name, name): own for name, own in preset.module_algo_map.items()}
        named = [*(preset.target_module or ()), *preset.module_algo_map]
        self._classes = {CLASS_ALIASES.get(name, name): name for name in reversed(named)}
        self._patterns = [*preset.target_name, *preset.name_algo_map]
        self._matched: set[str] = set()

    def visit(self, node: Node) -> None:
        if self._is_excluded(node.name):
            return
        patterns = [pattern for pattern in self._patterns if self._matches(pattern, node.name)]
        if not patterns:
            if node.class_name in self._classes:
                self._matched.add(node.class_name)
                self._take_inside(node, self._by_class.get(node.class_name))
            return
        if node.is_linear:
            self._matched.update(patterns)
            self._take(node, self._of_name(node))

    def unmatched(self) -> tuple[str, ...]:
        classes = [written for actual, written in self._classes.items() if actual not in self._matched]
        return tuple(sorted(classes) + sorted(set(self._patterns) - self._matched))

    def _take_inside(self, parent: Node, overrides: Overrides | None) -> None:
        for node in self._inside(parent):
            if self._is_excluded(node.name):
                continue
            if node.class_name in self._by_class and node is not parent:
                # A class of its own inside another: its overrides hold below it.
                self._take_inside(node, self._by_class[node.class_name])
            elif node.is_linear:
                self._take(node, overrides)

    def _take(self, node: Node, overrides: Overrides | None) -> None:
        self.selected.setdefault(node.name, overrides)

    def _of_name(self, node: Node) -> Overrides | None:
        maps = self._preset.name_algo_map
        if node.name in maps:
            return maps[node.name]
        found = next((own for pattern, own in maps.items() if self._matches(pattern, node.name)), None)
        return found if found is not None else self._by_class.get(node.class_name)

    def _inside(self, parent: Node) -> Iterator[Node]:
        prefix = f"{parent.name}." if parent.name else ""
        return (node for node in self.nodes if node is parent or node.name.startswith(prefix))

    def _is_excluded(self, name: str) -> bool:
        return bool(name) and any(self._matches(pattern, name) for pattern in self._preset.exclude_name)

    def _matches(self, pattern: str, name: str) -> bool:
        if pattern == name:
            return True
        if self._preset.use_fnmatch:
            return fnmatch.fnmatch(name, pattern)
        return re.match(pattern, name) is not None


def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """Split `dimension` into (smaller, larger) as LyCORIS does; a negative factor gives the most balanced split."""
    if factor > 0 and dimension % factor == 0:
        small, large = sorted((factor, dimension // factor))
        return small, large
    limit = dimension if factor < 0 else factor
    small = 1
    for candidate in range(2, min(limit, int(dimension**0.5)) + 1):
        if dimension % candidate == 0:
            small = candidate
    return small, dimension // small


def butterfly_factorization(dimension: int, factor: int) -> tuple[int, int] | None:
    """Split `dimension` into (block size, number of blocks) for BOFT: the largest even block size up to `factor` that
    leaves a power of two; None where there is none.
    """
    limit = dimension if factor == -1 else min(factor, dimension)
    for size in range(limit - limit % 2, 0, -2):
        count = dimension // size
        if dimension % size == 0 and count & (count - 1) == 0:
            return size, count
    return None
