"""Steps and epochs, with datasets that come and go."""

import pytest
from reverie_trainer.jobs.preparing.epochs import EpochClock, StepRange, phases_of, steps_without_data

TWO_SIZES = (StepRange(first=1, last=500), StepRange(first=501))


def test_phases_begin_where_the_pool_changes() -> None:
    ranges = [StepRange(), StepRange(first=10, last=20), StepRange(first=21)]
    assert [(phase.steps.first, phase.steps.last, phase.pool) for phase in phases_of(ranges)] == [
        (1, 9, (0,)),
        (10, 20, (0, 1)),
        (21, None, (0, 2)),
    ]


def test_steps_without_data_are_found() -> None:
    assert steps_without_data(TWO_SIZES, 10_000) is None
    assert steps_without_data(TWO_SIZES[:1], 500) is None
    assert steps_without_data(TWO_SIZES[:1], 501) == StepRange(first=501, last=501)
    assert steps_without_data([StepRange(first=3, last=4), StepRange(first=8)], 99) == StepRange(first=1, last=2)


def test_epochs_are_those_of_a_plain_count() -> None:
    clock = EpochClock(ranges=TWO_SIZES, num_batches=(7, 3), num_accumulated=2)
    done = 0.0
    for step in range(1, 700):
        done += 2 / (7 if step <= 500 else 3)
        assert clock.epoch_at(step) == pytest.approx(done, rel=1e-12)


def test_the_last_step_of_an_epoch_is_the_first_that_completes_it() -> None:
    clock = EpochClock(ranges=(StepRange(),), num_batches=(7,), num_accumulated=3)
    for num_epochs in (0.5, 1, 2, 10):
        step = clock.steps_for(num_epochs)
        assert clock.epoch_at(step) >= num_epochs > clock.epoch_at(step - 1)


def test_epochs_run_on_over_a_change_of_the_pool() -> None:
    clock = EpochClock(ranges=TWO_SIZES, num_batches=(100, 50), num_accumulated=1)
    assert clock.steps_for(5) == 500
    assert clock.steps_for(7) == 600


def test_epochs_after_the_end_of_all_datasets_are_refused() -> None:
    clock = EpochClock(ranges=TWO_SIZES[:1], num_batches=(100,))
    with pytest.raises(ValueError, match="the datasets end 1 epochs before epoch 6"):
        clock.steps_for(6)


@pytest.mark.parametrize(("every", "expected"), [(0.5, [4, 7, 11, 14]), (1.0, [7, 14]), (0.0, [])])
def test_a_step_crosses_a_multiple_of_epochs_once(every: float, expected: list[int]) -> None:
    clock = EpochClock(ranges=(StepRange(),), num_batches=(7,))
    assert [step for step in range(15) if clock.crosses(step, every)] == expected


def test_a_tenth_of_an_epoch_is_exact() -> None:
    clock = EpochClock(ranges=(StepRange(),), num_batches=(10,))
    assert all(clock.crosses(step, 0.1) for step in range(1, 1000))


@pytest.mark.parametrize(
    ("steps", "text"),
    [(StepRange(), "all"), (StepRange(first=5), "from 5"), (StepRange(first=5, last=9), "5 to 9")],
)
def test_steps_are_written_for_people(steps: StepRange, text: str) -> None:
    assert str(steps) == text
