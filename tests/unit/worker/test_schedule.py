"""The order of training: every rule of spec 6.5, and that it is a pure function."""

from collections import Counter

import pytest
from reverie_trainer.worker.schedule import SampleGroup, Schedule, Visit


def _group(first: int, count: int, passes: int = 1) -> SampleGroup:
    return SampleGroup(members=tuple(range(first, first + count)), num_passes=passes)


def _epoch(schedule: Schedule, epoch: int = 0) -> list[list[int]]:
    first = epoch * schedule.num_batches_per_epoch + 1
    steps = range(first, first + schedule.num_batches_per_epoch)
    return [[visit.sample for visit in batch] for step in steps for batch in schedule.micro_batches(step)]


def test_repeats_are_extra_passes() -> None:
    schedule = Schedule([_group(0, 20, passes=1001)], seed=42, batch_size=1)
    assert schedule.num_batches_per_epoch == 20_020


def test_an_epoch_shows_every_sample_once_for_each_pass() -> None:
    schedule = Schedule([_group(0, 5, passes=3), _group(5, 4, passes=2)], seed=1, batch_size=1)
    counts = Counter(sample for batch in _epoch(schedule) for sample in batch)
    assert counts == {**dict.fromkeys(range(5), 3), **dict.fromkeys(range(5, 9), 2)}


def test_a_sample_comes_again_only_when_its_whole_group_was_shown() -> None:
    schedule = Schedule([_group(0, 6, passes=4)], seed=3, batch_size=6)
    assert [sorted(batch) for batch in _epoch(schedule)] == [list(range(6))] * 4


def test_batches_never_mix_groups() -> None:
    groups = [_group(0, 7), _group(7, 5), _group(12, 3, passes=2)]
    schedule = Schedule(groups, seed=5, batch_size=2)
    members = [set(group.members) for group in groups]
    assert all(any(set(batch) <= group for group in members) for batch in _epoch(schedule))


def test_an_underfilled_last_batch_is_filled_up_with_samples_of_its_group() -> None:
    schedule = Schedule([_group(0, 5)], seed=7, batch_size=3)
    batches = _epoch(schedule)
    assert [len(batch) for batch in batches] == [3, 3]
    assert Counter(sample for batch in batches for sample in batch).most_common(1)[0][1] == 2
    assert {sample for batch in batches for sample in batch} == set(range(5))


def test_a_group_smaller_than_the_batch_repeats_itself() -> None:
    schedule = Schedule([_group(0, 2)], seed=7, batch_size=5)
    assert Counter(_epoch(schedule)[0]).most_common() in ([(0, 3), (1, 2)], [(1, 3), (0, 2)])


def test_epochs_differ_and_groups_interleave() -> None:
    schedule = Schedule([_group(0, 20), _group(20, 20)], seed=42, batch_size=1)
    first, second = _epoch(schedule, 0), _epoch(schedule, 1)
    assert first != second
    assert sorted(first) == sorted(second)
    assert first != sorted(first, key=lambda batch: batch[0] >= 20)


def test_a_step_does_not_depend_on_what_was_asked_before() -> None:
    groups = [_group(0, 9), _group(9, 4, passes=3)]
    walked = Schedule(groups, seed=11, batch_size=2, num_accumulated=3)
    expected = [walked.micro_batches(step) for step in range(1, 30)]
    asked_once = [
        Schedule(groups, seed=11, batch_size=2, num_accumulated=3).micro_batches(step) for step in range(1, 30)
    ]
    assert asked_once == expected


def test_another_seed_gives_another_order() -> None:
    groups = [_group(0, 50)]
    assert _epoch(Schedule(groups, seed=1, batch_size=1)) != _epoch(Schedule(groups, seed=2, batch_size=1))


def test_accumulation_takes_the_next_batches_and_counts_positions_through() -> None:
    groups = [_group(0, 12)]
    single = Schedule(groups, seed=4, batch_size=2)
    accumulated = Schedule(groups, seed=4, batch_size=2, num_accumulated=3)
    step = accumulated.micro_batches(2)
    assert [[visit.sample for visit in batch] for batch in step] == _epoch(single)[3:6]
    assert [visit.position for batch in step for visit in batch] == [0, 1, 2, 3, 4, 5]
    assert {visit.step for batch in step for visit in batch} == {2}


def test_the_order_is_the_one_it_always_was() -> None:
    schedule = Schedule([_group(0, 3), _group(3, 2)], seed=42, batch_size=1)
    assert schedule.micro_batches(1) == [[Visit(sample=GOLDEN[0], step=1, position=0)]]
    assert [batch[0] for batch in _epoch(schedule)] == GOLDEN


GOLDEN = [4, 0, 2, 3, 1]


def test_refuses_a_schedule_with_nothing_to_show() -> None:
    with pytest.raises(ValueError, match="at least one group"):
        Schedule([], seed=1, batch_size=1)


def test_refuses_an_empty_group() -> None:
    with pytest.raises(ValueError, match="a group needs samples"):
        SampleGroup(members=(), num_passes=1)


@pytest.mark.parametrize(("batch_size", "accumulated"), [(0, 1), (1, 0)])
def test_refuses_an_empty_batch(batch_size: int, accumulated: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Schedule([_group(0, 1)], seed=1, batch_size=batch_size, num_accumulated=accumulated)


def test_refuses_step_zero() -> None:
    with pytest.raises(ValueError, match="before the first"):
        Schedule([_group(0, 1)], seed=1, batch_size=1).micro_batches(0)
