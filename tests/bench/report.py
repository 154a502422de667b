"""What the benchmarks print: one line for each figure, with its limit where it has one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One measured figure."""

    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def passes(self) -> bool:
        """Whether the figure keeps its limit; true where it has none."""
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    def line(self) -> str:
        """The figure for people."""
        limits = [f">= {self.at_least:g}"] if self.at_least is not None else []
        limits += [f"<= {self.at_most:g}"] if self.at_most is not None else []
        verdict = ("ok  " if self.passes else "MISS") if limits else "    "
        return f"{verdict} {self.name:<72} {self.value:>10.3f} {self.unit:<10} {' '.join(limits)}"


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(contenders: Sequence[Callable[[], object]], *, rounds: int, warm_up: int = 2) -> list[list[float]]:
    """Seconds of each contender in each round, taken in turn so that a machine that drifts hits all alike.

    Every second round goes backwards: whoever comes first finds other caches, and a store that is still busy.
    """
    for _ in range(warm_up):
        for contender in contenders:
            contender()
    taken: list[list[float]] = [[] for _ in contenders]
    for number in range(rounds):
        turn = list(zip(taken, contenders, strict=True))
        for times, contender in reversed(turn) if number % 2 else turn:
            times.append(seconds_of(contender))
    return taken


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over the rounds of the ratio within each round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
