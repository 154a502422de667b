"""Learning rates against values worked out by hand."""

import math

import pytest
from reverie_common.optimizer_catalogue import SCHEDULES
from reverie_hidream.optimizers import learning_rate_at


def rates(schedule: str, steps: range, **settings: float) -> list[float]:
    return [learning_rate_at(schedule, step, learning_rate=8.0, **settings) for step in steps]  # type: ignore[arg-type]  # counts are whole


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup"])
def test_constant_schedules_warm_up_linearly_and_stay(schedule: str) -> None:
    assert rates(schedule, range(1, 8), warmup_steps=4) == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0, 8.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_warms_up_once_and_begins_at_the_full_rate(schedule: str) -> None:
    found = rates(schedule, range(1, 6), warmup_steps=4, max_steps=104)

    assert found == [2.0, 4.0, 6.0, 8.0, 8.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_without_warm_up_begins_at_the_full_rate(schedule: str) -> None:
    assert rates(schedule, range(1, 2), max_steps=10) == [8.0]


def test_linear_falls_by_the_same_each_step() -> None:
    found = rates("linear", range(3, 14), warmup_steps=2, max_steps=10, end=0.0)

    assert found == [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0]


def test_linear_ends_at_the_end() -> None:
    assert rates("linear", range(1, 6), max_steps=4, end=4.0) == [8.0, 7.0, 6.0, 5.0, 4.0]


def test_cosine_falls_by_half_a_cosine_after_its_own_warm_up() -> None:
    found = rates("cosine", range(1, 12), warmup_steps=2, max_steps=10)

    assert found == pytest.approx([4.0, 8.0] + [4.0 * (1 + math.cos(math.pi * k / 8)) for k in range(9)])
    assert found[-1] == 0.0
    assert rates("cosine", range(5, 6), max_steps=8, end=4.0) == pytest.approx([6.0])


def test_restarts_begin_each_cycle_at_the_full_rate_and_end_at_the_end() -> None:
    found = rates("cosine_with_restarts", range(1, 10), max_steps=8, num_cycles=2)

    assert found == pytest.approx([8.0, 4.0 + 4 / math.sqrt(2), 4.0, 4.0 - 4 / math.sqrt(2)] * 2 + [0.0])


def test_restarts_with_one_cycle_are_a_cosine() -> None:
    steps = range(1, 30)

    assert rates("cosine_with_restarts", steps, max_steps=20) == pytest.approx(rates("cosine", steps, max_steps=20))


def test_polynomial_falls_by_its_power() -> None:
    found = rates("polynomial", range(1, 6), max_steps=4, end=4e-7, power=0.8)

    assert found == pytest.approx([4e-7 + (8 - 4e-7) * (1 - k / 4) ** 0.8 for k in range(5)])
    assert rates("polynomial", range(1, 6), max_steps=4, power=2.0) == [8.0, 4.5, 2.0, 0.5, 0.0]
    assert rates("polynomial", range(1, 9), max_steps=8, power=1.0) == rates("linear", range(1, 9), max_steps=8)


def test_sine_swings_down_as_often_as_it_has_cycles_and_ends_down() -> None:
    assert rates("sine", range(1, 8), max_steps=6, end=2.0, num_cycles=2) == pytest.approx([8, 5, 2, 5, 8, 5, 2])
    assert rates("sine", range(1, 9), max_steps=8) == pytest.approx(rates("cosine", range(1, 9), max_steps=8))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_is_a_function_of_the_step_alone(schedule: str) -> None:
    forwards = rates(schedule, range(1, 21), warmup_steps=3, max_steps=20)
    backwards = [rates(schedule, range(step, step + 1), warmup_steps=3, max_steps=20)[0] for step in range(20, 0, -1)]

    assert forwards == backwards[::-1]


@pytest.mark.parametrize(("schedule", "step"), [("sinus", 1), ("cosine", 0)])
def test_refuses_an_unknown_schedule_or_step(schedule: str, step: int) -> None:
    with pytest.raises(ValueError, match=r"unknown|before the first"):
        learning_rate_at(schedule, step, learning_rate=1.0)
