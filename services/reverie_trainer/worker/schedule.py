"""Which samples are seen at which step: pure functions of the job's seed and the step (design 6, spec 6.5).

An epoch shows every group of samples, one for each dataset and size, 1 + repeats times. Each of these passes is a
permutation of the group; the passes follow one another and are cut into batches, so that a batch never mixes datasets
or sizes; the last batch of a group is filled up from the group's beginning. The batches of all groups come in a random
order. Epochs follow one another without a break: gradient accumulation takes the next batches, wherever they are.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from reverie_hidream.randomness import Draw

_KEPT_PERMUTATIONS = 256


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
class Visit:
    """One sample at one place of the training: everything that its random numbers depend on besides the seed."""

    sample: int
    """Index of the sample in the prepared manifest."""
    step: int
    """Optimiser step, from 1."""
    position: int
    """Place in the global batch, which is all samples of one optimiser step, from 0."""


class Schedule:
    """The order of a whole job."""

    def __init__(self, groups: Sequence[SampleGroup], *, seed: int, batch_size: int, num_accumulated: int = 1) -> None:
        """Lay out an epoch.

        Args:
            groups: in a fixed order; the order of the job depends on it.
            batch_size: samples in one micro-batch.
            num_accumulated: micro-batches in one optimiser step.

        Raises:
            ValueError: nothing to show.
        """
        if not groups:
            raise ValueError("a schedule needs at least one group of samples; got none")
        if batch_size < 1 or num_accumulated < 1:
            raise ValueError(f"batch size {batch_size} and accumulation {num_accumulated} must be at least 1")
        self._groups = tuple(groups)
        self._batch_size = batch_size
        self._num_accumulated = num_accumulated
        self._ends = list(accumulate(-(-group.num_visits // batch_size) for group in groups))
        self._order = Draw(seed=seed, stream="order")
        self._buckets = Draw(seed=seed, stream="buckets")
        # A pass or an epoch is asked for once for each of its batches.
        self._pass_order = lru_cache(maxsize=_KEPT_PERMUTATIONS)(self._draw_pass_order)
        self._batch_order = lru_cache(maxsize=2)(self._draw_batch_order)

    @property
    def num_batches_per_epoch(self) -> int:
        """Micro-batches in one epoch."""
        return self._ends[-1]

    def micro_batches(self, step: int) -> list[list[Visit]]:
        """Return the micro-batches of an optimiser step, counted from 1."""
        if step < 1:
            raise ValueError(f"step {step} is before the first, which is 1")
        first = (step - 1) * self._num_accumulated
        return [
            [
                Visit(sample=sample, step=step, position=index * self._batch_size + place)
                for place, sample in enumerate(self._samples(first + index))
            ]
            for index in range(self._num_accumulated)
        ]

    def _samples(self, micro_batch: int) -> list[int]:
        epoch, index = divmod(micro_batch, self.num_batches_per_epoch)
        batch = self._batch_order(epoch)[index]
        group_index = bisect.bisect_right(self._ends, batch)
        begin = self._ends[group_index - 1] if group_index else 0
        first = (batch - begin) * self._batch_size
        group = self._groups[group_index]
        return [
            self._sample(epoch, group_index, visit % group.num_visits)
            for visit in range(first, first + self._batch_size)
        ]

    def _sample(self, epoch: int, group_index: int, visit: int) -> int:
        members = self._groups[group_index].members
        pass_index, place = divmod(visit, len(members))
        return members[self._pass_order(epoch, group_index, pass_index)[place]]

    def _draw_pass_order(self, epoch: int, group_index: int, pass_index: int) -> Sequence[int]:
        num_members = len(self._groups[group_index].members)
        position = pass_index * len(self._groups) + group_index
        return [int(member) for member in self._order.permutation(epoch, num_members, position)]

    def _draw_batch_order(self, epoch: int) -> Sequence[int]:
        order: list[int] = self._buckets.permutation(epoch, self.num_batches_per_epoch).tolist()
        return order
