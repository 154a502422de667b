"""Which samples are seen at which step: pure functions of the job's seed and the step (design 6, spec 6.5).

An epoch shows every group of samples, one for each dataset and size, 1 + repeats times. Each of these passes is a
permutation of the group; the passes follow one another and are cut into batches, so that a batch never mixes datasets
or sizes; the last batch of a group is filled up from the group's beginning. The batches of a dataset come in a random
order. Which dataset gives the next batch is drawn by weight; one that has given all its batches leaves the pool until
the epoch ends. Epochs follow one another without a break: gradient accumulation takes the next batches, wherever they
are. Where datasets begin or end at certain steps, a new epoch begins.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from reverie_hidream.randomness import Draw

from reverie_trainer.jobs.preparing.epochs import EpochClock, Phase, StepRange, phases_of

if TYPE_CHECKING:
    import numpy.typing as npt

_KEPT_PERMUTATIONS = 256
_KEPT_EPOCHS = 4

# Epochs are numbered within their phase; no phase has so many that two of them would draw the same.
_EPOCHS_OF_A_PHASE = 2**40

SAMPLINGS = ("auto", "uniform")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleGroup:
    """Samples of one dataset that have one size."""

    members: tuple[int, ...]
    """Indices of the samples in the prepared manifest."""
    num_passes: int
    """How often each is shown in an epoch: 1 + repeats."""

    def __post_init__(self) -> None:
        """Refuse a group that could fill no batch."""
        if not self.members or self.num_passes < 1:
            raise ValueError(f"a group needs samples and passes; got {len(self.members)} and {self.num_passes}")

    @property
    def num_visits(self) -> int:
        """Samples that an epoch shows of this group."""
        return len(self.members) * self.num_passes


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledDataset:
    """One dataset, in groups of one size each."""

    groups: tuple[SampleGroup, ...]
    """In a fixed order; the order of the job depends on it."""
    probability: float = 1.0
    steps: StepRange = field(default_factory=StepRange)
    """When it is used."""

    def __post_init__(self) -> None:
        """Refuse a dataset that could never be chosen."""
        if not self.groups or not self.probability > 0:
            raise ValueError(
                f"a dataset needs at least one group of samples and a probability above 0; got {len(self.groups)} and "
                f"{self.probability}"
            )

    @property
    def num_visits(self) -> int:
        """Samples that an epoch shows of it."""
        return sum(group.num_visits for group in self.groups)


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """One sample at one place of the training: everything that its random numbers depend on besides the seed."""

    sample: int
    """Index of the sample in the prepared manifest."""
    step: int
    """Optimiser step, from 1."""
    position: int
    """Place in the global batch, which is all samples of one optimiser step, from 0."""


class Schedule:
    """The order of a whole job. Any step may be asked for at any time; what is drawn once for an epoch is kept."""

    def __init__(
        self,
        datasets: Sequence[ScheduledDataset],
        *,
        seed: int,
        batch_size: int,
        num_accumulated: int = 1,
        sampling: str = "auto",
    ) -> None:
        """Lay out an epoch.

        Args:
            datasets: in a fixed order; the order of the job depends on it.
            batch_size: samples in one micro-batch.
            num_accumulated: micro-batches in one optimiser step.
            sampling: `auto` weighs datasets by probability and size, `uniform` by probability alone.

        Raises:
            ValueError: nothing to show, or `sampling` is unknown.
        """
        if not datasets:
            raise ValueError("a schedule needs at least one dataset; got none")
        if batch_size < 1 or num_accumulated < 1:
            raise ValueError(f"batch size {batch_size} and accumulation {num_accumulated} must be at least 1")
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling {sampling!r} is unknown; use one of {', '.join(SAMPLINGS)}")
        self._batch_size = batch_size
        self._num_accumulated = num_accumulated
        self._num_groups = sum(len(dataset.groups) for dataset in datasets)
        firsts = [0, *accumulate(len(dataset.groups) for dataset in datasets)]
        self._layouts = [
            _Layout.of(dataset, batch_size=batch_size, first_group=first, sampling=sampling)
            for dataset, first in zip(datasets, firsts[:-1], strict=True)
        ]
        ranges = [dataset.steps for dataset in datasets]
        self._phases = phases_of(ranges)
        self.clock = EpochClock(
            ranges=ranges,
            num_batches=[layout.num_batches for layout in self._layouts],
            num_accumulated=num_accumulated,
        )
        self._order = Draw(seed=seed, stream="order")
        self._buckets = Draw(seed=seed, stream="buckets")
        self._datasets = Draw(seed=seed, stream="datasets")
        # A pass or an epoch is asked for once for each of its batches.
        self._pass_order = lru_cache(maxsize=_KEPT_PERMUTATIONS)(self._draw_pass_order)
        self._batch_order = lru_cache(maxsize=_KEPT_EPOCHS * len(datasets))(self._draw_batch_order)
        self._turns = lru_cache(maxsize=_KEPT_EPOCHS)(self._draw_turns)

    @property
    def num_batches_per_epoch(self) -> int:
        """Micro-batches in one epoch of every dataset."""
        return sum(layout.num_batches for layout in self._layouts)

    def epoch_at(self, step: int) -> float:
        """Return the epochs done after a step, with the fraction."""
        return self.clock.epoch_at(step)

    def micro_batches(self, step: int) -> list[list[Visit]]:
        """Return the micro-batches of an optimiser step, counted from 1.

        Raises:
            ValueError: the step is before the first one, or no dataset is used at it.
        """
        if step < 1:
            raise ValueError(f"step {step} is before the first, which is 1")
        number, phase = next((index, item) for index, item in enumerate(self._phases) if step in item.steps)
        if not phase.pool:
            raise ValueError(f"no dataset is used at step {step}; change start_step or end_step of one")
        first = (step - phase.steps.first) * self._num_accumulated
        return [
            [
                Visit(sample=sample, step=step, position=index * self._batch_size + place)
                for place, sample in enumerate(self._samples(number, phase, first + index))
            ]
            for index in range(self._num_accumulated)
        ]

    def _samples(self, number: int, phase: Phase, micro_batch: int) -> list[int]:
        """The samples of one micro-batch, counted from 0 in its phase."""
        epoch, index = divmod(micro_batch, sum(self._layouts[member].num_batches for member in phase.pool))
        epoch += number * _EPOCHS_OF_A_PHASE
        turns, occurrences = self._turns(epoch, phase.pool)
        dataset = phase.pool[int(turns[index])]
        layout = self._layouts[dataset]
        batch = int(self._batch_order(epoch, dataset)[occurrences[index]])
        group_index = bisect.bisect_right(layout.ends, batch)
        first = (batch - layout.begin(group_index)) * self._batch_size
        group = layout.dataset.groups[group_index]
        place = layout.first_group + group_index
        return [
            self._sample(epoch, group, place, visit % group.num_visits)
            for visit in range(first, first + self._batch_size)
        ]

    def _sample(self, epoch: int, group: SampleGroup, place: int, visit: int) -> int:
        pass_index, member = divmod(visit, len(group.members))
        return group.members[self._pass_order(epoch, place, len(group.members), pass_index)[member]]

    def _draw_pass_order(self, epoch: int, place: int, num_members: int, pass_index: int) -> Sequence[int]:
        position = pass_index * self._num_groups + place
        return [int(member) for member in self._order.permutation(epoch, num_members, position)]

    def _draw_batch_order(self, epoch: int, dataset: int) -> npt.NDArray[np.int64]:
        return self._buckets.permutation(epoch, self._layouts[dataset].num_batches, dataset)

    def _draw_turns(self, epoch: int, pool: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Which dataset of the pool gives each batch of an epoch, and which of its own batches that is."""
        sizes = np.array([self._layouts[member].num_batches for member in pool])
        weights = np.array([self._layouts[member].weight for member in pool])
        draws = self._datasets.generator(epoch, 0).random(int(sizes.sum()))
        return draw_turns(draws, weights, sizes)


def draw_turns(
    draws: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Turn uniform numbers into choices by weight, without replacement: what has given all leaves the pool.

    Args:
        draws: (N,) in [0, 1), one for each choice; N is the sum of the sizes.
        weights: (D,) above 0.
        sizes: (D,) how often each can be chosen.

    Returns:
        (N,) which is chosen; (N,) how often it was chosen before.
    """
    turns = np.empty(len(draws), dtype=np.int64)
    left = sizes.copy()
    begin = 0
    # The pool changes once for each dataset, so that an epoch of millions of batches is a few array operations.
    while begin < len(draws):
        shares = np.cumsum(np.where(left > 0, weights, 0.0))
        chosen = np.searchsorted(shares / shares[-1], draws[begin:], side="right")
        end = min(_place_of(chosen == member, int(left[member])) for member in np.flatnonzero(left)) + 1
        turns[begin : begin + end] = chosen[:end]
        left -= np.bincount(chosen[:end], minlength=len(left))
        begin += end
    occurrences = np.empty_like(turns)
    for member in range(len(sizes)):
        occurrences[turns == member] = np.arange(sizes[member])
    return turns, occurrences


def _place_of(is_chosen: npt.NDArray[np.bool_], count: int) -> int:
    """Where a dataset is chosen for the `count`-th time; the last place where that does not happen."""
    places = np.flatnonzero(is_chosen)
    return int(places[count - 1]) if len(places) >= count else len(is_chosen) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """How one dataset's epoch is cut into batches."""

    dataset: ScheduledDataset
    first_group: int
    """Place of its first group among those of all datasets."""
    ends: tuple[int, ...]
    """Number of the first batch after each group."""
    weight: float

    @classmethod
    def of(cls, dataset: ScheduledDataset, *, batch_size: int, first_group: int, sampling: str) -> _Layout:
        return cls(
            dataset=dataset,
            first_group=first_group,
            ends=tuple(accumulate(-(-group.num_visits // batch_size) for group in dataset.groups)),
            weight=dataset.probability * (dataset.num_visits if sampling == "auto" else 1),
        )

    @property
    def num_batches(self) -> int:
        return self.ends[-1]

    def begin(self, group_index: int) -> int:
        return self.ends[group_index - 1] if group_index else 0
