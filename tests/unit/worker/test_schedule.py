"""The order of training: every rule of spec 6.5, and that it is a pure function."""

import time
from collections import Counter

import numpy as np
import pytest
from reverie_trainer.jobs.preparing.epochs import StepRange
from reverie_trainer.worker.schedule import SampleGroup, Schedule, ScheduledDataset, Visit, draw_turns


def _group(first: int, count: int, passes: int = 1) -> SampleGroup:
    return SampleGroup(members=tuple(range(first, first + count)), num_passes=passes)


def _one(*groups: SampleGroup) -> list[ScheduledDataset]:
    """All groups as those of one dataset."""
    return [ScheduledDataset(groups=groups)]


def _epoch(schedule: Schedule, epoch: int = 0) -> list[list[int]]:
    first = epoch * schedule.num_batches_per_epoch + 1
    steps = range(first, first + schedule.num_batches_per_epoch)
    return [[visit.sample for visit in batch] for step in steps for batch in schedule.micro_batches(step)]


def test_repeats_are_extra_passes() -> None:
    schedule = Schedule(_one(_group(0, 20, passes=1001)), seed=42, batch_size=1)
    assert schedule.num_batches_per_epoch == 20_020


def test_an_epoch_shows_every_sample_once_for_each_pass() -> None:
    schedule = Schedule(_one(_group(0, 5, passes=3), _group(5, 4, passes=2)), seed=1, batch_size=1)
    counts = Counter(sample for batch in _epoch(schedule) for sample in batch)
    assert counts == {**dict.fromkeys(range(5), 3), **dict.fromkeys(range(5, 9), 2)}


def test_a_sample_comes_again_only_when_its_whole_group_was_shown() -> None:
    schedule = Schedule(_one(_group(0, 6, passes=4)), seed=3, batch_size=6)
    assert [sorted(batch) for batch in _epoch(schedule)] == [list(range(6))] * 4


def test_batches_never_mix_groups() -> None:
    groups = [_group(0, 7), _group(7, 5), _group(12, 3, passes=2)]
    schedule = Schedule(_one(*groups), seed=5, batch_size=2)
    members = [set(group.members) for group in groups]
    assert all(any(set(batch) <= group for group in members) for batch in _epoch(schedule))


def test_an_underfilled_last_batch_is_filled_up_with_samples_of_its_group() -> None:
    schedule = Schedule(_one(_group(0, 5)), seed=7, batch_size=3)
    batches = _epoch(schedule)
    assert [len(batch) for batch in batches] == [3, 3]
    assert Counter(sample for batch in batches for sample in batch).most_common(1)[0][1] == 2
    assert {sample for batch in batches for sample in batch} == set(range(5))


def test_a_group_smaller_than_the_batch_repeats_itself() -> None:
    schedule = Schedule(_one(_group(0, 2)), seed=7, batch_size=5)
    assert Counter(_epoch(schedule)[0]).most_common() in ([(0, 3), (1, 2)], [(1, 3), (0, 2)])


def test_epochs_differ_and_groups_interleave() -> None:
    schedule = Schedule(_one(_group(0, 20), _group(20, 20)), seed=42, batch_size=1)
    first, second = _epoch(schedule, 0), _epoch(schedule, 1)
    assert first != second
    assert sorted(first) == sorted(second)
    assert first != sorted(first, key=lambda batch: batch[0] >= 20)


def test_a_step_does_not_depend_on_what_was_asked_before() -> None:
    groups = [_group(0, 9), _group(9, 4, passes=3)]
    walked = Schedule(_one(*groups), seed=11, batch_size=2, num_accumulated=3)
    expected = [walked.micro_batches(step) for step in range(1, 30)]
    asked_once = [
        Schedule(_one(*groups), seed=11, batch_size=2, num_accumulated=3).micro_batches(step) for step in range(1, 30)
    ]
    assert asked_once == expected


def test_another_seed_gives_another_order() -> None:
    groups = [_group(0, 50)]
    assert _epoch(Schedule(_one(*groups), seed=1, batch_size=1)) != _epoch(
        Schedule(_one(*groups), seed=2, batch_size=1)
    )


def test_accumulation_takes_the_next_batches_and_counts_positions_through() -> None:
    groups = [_group(0, 12)]
    single = Schedule(_one(*groups), seed=4, batch_size=2)
    accumulated = Schedule(_one(*groups), seed=4, batch_size=2, num_accumulated=3)
    step = accumulated.micro_batches(2)
    assert [[visit.sample for visit in batch] for batch in step] == _epoch(single)[3:6]
    assert [visit.position for batch in step for visit in batch] == [0, 1, 2, 3, 4, 5]
    assert {visit.step for batch in step for visit in batch} == {2}


def test_the_order_is_the_one_it_always_was() -> None:
    schedule = Schedule(_one(_group(0, 3), _group(3, 2)), seed=42, batch_size=1)
    assert schedule.micro_batches(1) == [[Visit(sample=GOLDEN[0], step=1, position=0)]]
    assert [batch[0] for batch in _epoch(schedule)] == GOLDEN


GOLDEN = [4, 0, 2, 3, 1]


def test_refuses_a_schedule_with_nothing_to_show() -> None:
    with pytest.raises(ValueError, match="at least one dataset"):
        Schedule([], seed=1, batch_size=1)


def test_refuses_an_empty_group() -> None:
    with pytest.raises(ValueError, match="a group needs samples"):
        SampleGroup(members=(), num_passes=1)


@pytest.mark.parametrize(("batch_size", "accumulated"), [(0, 1), (1, 0)])
def test_refuses_an_empty_batch(batch_size: int, accumulated: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Schedule(_one(_group(0, 1)), seed=1, batch_size=batch_size, num_accumulated=accumulated)


def test_refuses_step_zero() -> None:
    with pytest.raises(ValueError, match="before the first"):
        Schedule(_one(_group(0, 1)), seed=1, batch_size=1).micro_batches(0)


def _datasets_of(schedule: Schedule, limits: list[int], steps: range) -> list[int]:
    """Which dataset each micro-batch of the steps is from; its samples are below its limit."""
    found = []
    for step in steps:
        for batch in schedule.micro_batches(step):
            owners = {sum(visit.sample >= limit for limit in limits) for visit in batch}
            assert len(owners) == 1
            found.append(owners.pop())
    return found


def _two(first: int, second: int, *, probability: float = 1.0) -> list[ScheduledDataset]:
    return [
        ScheduledDataset(groups=(_group(0, first),)),
        ScheduledDataset(groups=(_group(first, second),), probability=probability),
    ]


def test_an_epoch_of_several_datasets_shows_everything_once() -> None:
    schedule = Schedule(_two(7, 5), seed=3, batch_size=2)
    shown = [set(batch) for batch in _epoch(schedule)]
    assert len(shown) == 4 + 3
    assert set().union(*shown) == set(range(12))
    assert all(batch <= set(range(7)) or batch <= set(range(7, 12)) for batch in shown)


def test_auto_weighs_by_size_and_uniform_does_not() -> None:
    shares = {}
    for sampling in ("auto", "uniform"):
        schedule = Schedule(_two(9000, 1000), seed=1, batch_size=1, sampling=sampling)
        turns = _datasets_of(schedule, [9000], range(1, 1001))
        shares[sampling] = turns.count(1) / 1000
    assert 0.07 < shares["auto"] < 0.13
    assert 0.45 < shares["uniform"] < 0.55


def test_probability_weighs() -> None:
    schedule = Schedule(_two(5000, 5000, probability=3.0), seed=1, batch_size=1, sampling="uniform")
    assert 0.71 < _datasets_of(schedule, [5000], range(1, 1001)).count(1) / 1000 < 0.79


def test_a_dataset_that_is_used_up_leaves_the_pool_until_the_epoch_ends() -> None:
    schedule = Schedule(_two(40, 10), seed=2, batch_size=1, sampling="uniform")
    turns = _datasets_of(schedule, [40], range(1, 51))
    last = max(index for index, turn in enumerate(turns) if turn == 1)
    assert last < 40
    assert turns.count(1) == 10
    assert 1 in _datasets_of(schedule, [40], range(51, 61))


def test_turns_are_those_of_a_plain_loop() -> None:
    draws = np.random.default_rng(5).random(60)
    weights, sizes = np.array([1.0, 5.0, 2.0]), np.array([30, 20, 10])
    turns, occurrences = draw_turns(draws, weights, sizes)
    left, expected = [30, 20, 10], []
    for draw in draws:
        alive = [weight if count else 0.0 for weight, count in zip((1.0, 5.0, 2.0), left, strict=True)]
        shares = [sum(alive[: index + 1]) / sum(alive) for index in range(3)]
        chosen = next(index for index, share in enumerate(shares) if draw < share)
        expected.append((chosen, [30, 20, 10][chosen] - left[chosen]))
        left[chosen] -= 1
    assert list(zip(turns.tolist(), occurrences.tolist(), strict=True)) == expected


def test_datasets_come_and_go_at_their_steps() -> None:
    datasets = [
        ScheduledDataset(groups=(_group(0, 4),), steps=StepRange(first=1, last=6)),
        ScheduledDataset(groups=(_group(4, 4),), steps=StepRange(first=7)),
    ]
    schedule = Schedule(datasets, seed=9, batch_size=1, num_accumulated=2)
    assert _datasets_of(schedule, [4], range(1, 11)) == [0] * 12 + [1] * 8
    # A change of the pool begins an epoch: the first two steps after it show all four images.
    assert {visit.sample for step in (7, 8) for batch in schedule.micro_batches(step) for visit in batch} == {
        4,
        5,
        6,
        7,
    }


def test_epochs_are_counted_with_their_fraction() -> None:
    schedule = Schedule(_two(7, 5), seed=3, batch_size=2, num_accumulated=2)
    assert schedule.epoch_at(0) == 0.0
    assert schedule.epoch_at(7) == 2.0
    assert schedule.epoch_at(1) == pytest.approx(2 / 7)


def test_a_late_step_of_a_large_dataset_is_found_without_walking_there() -> None:
    datasets = [ScheduledDataset(groups=(_group(0, 10_000, passes=20),)), *_two(10_000, 9)[1:]]
    schedule = Schedule(datasets, seed=3, batch_size=1)
    begin = time.process_time()
    for step in (1_000_000, 999_999, 1_000_001):
        schedule.micro_batches(step)
    assert time.process_time() - begin < 2.0


def test_refuses_a_step_without_a_dataset() -> None:
    datasets = [ScheduledDataset(groups=(_group(0, 4),), steps=StepRange(first=1, last=6))]
    with pytest.raises(ValueError, match="no dataset is used at step 7"):
        Schedule(datasets, seed=9, batch_size=1).micro_batches(7)


def test_refuses_another_sampling() -> None:
    with pytest.raises(ValueError, match="sampling 'even' is unknown"):
        Schedule(_one(_group(0, 1)), seed=9, batch_size=1, sampling="even")


def test_refuses_a_dataset_that_can_never_be_chosen() -> None:
    with pytest.raises(ValueError, match="probability above 0"):
        ScheduledDataset(groups=(_group(0, 1),), probability=0.0)
