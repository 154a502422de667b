"""Random numbers as functions of seed, stream, step and position."""

import numpy as np
import pytest
from reverie_hidream.randomness import Draw

GOLDEN_NORMAL = [-1.1751532554626465, 0.3035411536693573]
GOLDEN_UNIFORM = 0.40523124340068084
GOLDEN_PERMUTATION = [2, 4, 5, 1, 3, 0]


def test_a_draw_depends_on_nothing_that_was_drawn_before() -> None:
    draw = Draw(seed=1, stream="noise")
    first = draw.normal(7, 2, (3, 4))
    draw.normal(1, 1, (100,))

    assert np.array_equal(draw.normal(7, 2, (3, 4)), first)
    assert np.array_equal(Draw(seed=1, stream="noise").normal(7, 2, (3, 4)), first)


@pytest.mark.parametrize(
    ("seed", "stream", "step", "position"),
    [(2, "noise", 7, 2), (1, "timestep", 7, 2), (1, "noise", 8, 2), (1, "noise", 7, 3), (1, "noise", 2, 7)],
)
def test_every_coordinate_changes_the_draw(seed: int, stream: str, step: int, position: int) -> None:
    reference = Draw(seed=1, stream="noise").normal(7, 2, (16,))

    assert not np.isclose(Draw(seed=seed, stream=stream).normal(step, position, (16,)), reference).any()


def test_neighbouring_positions_do_not_share_numbers() -> None:
    draw = Draw(seed=0, stream="noise")

    numbers = np.concatenate([draw.normal(0, position, (5000,)) for position in range(4)])

    assert len(np.unique(numbers)) > 0.99 * len(numbers)
    assert abs(numbers.mean()) < 0.03
    assert abs(numbers.std() - 1.0) < 0.03


def test_the_numbers_are_the_same_on_every_machine_and_day() -> None:
    draw = Draw(seed=42, stream="timestep")

    assert draw.normal(3, 1, (2,)).tolist() == pytest.approx(GOLDEN_NORMAL, rel=1e-6)
    assert draw.uniform(3, 1) == pytest.approx(GOLDEN_UNIFORM, rel=1e-12)
    assert draw.permutation(3, 6).tolist() == GOLDEN_PERMUTATION


def test_normal_numbers_are_float32() -> None:
    assert Draw(seed=0, stream="noise").normal(0, 0, (2, 3)).dtype == np.float32


def test_uniform_numbers_fill_the_unit_interval() -> None:
    draw = Draw(seed=0, stream="dropout")
    numbers = [draw.uniform(step, 0) for step in range(1000)]

    assert 0.0 <= min(numbers) < 0.01
    assert 0.99 < max(numbers) < 1.0


def test_a_permutation_holds_every_item_once_and_differs_by_epoch() -> None:
    draw = Draw(seed=0, stream="order")

    first, second = draw.permutation(0, 50), draw.permutation(1, 50)

    assert sorted(first) == sorted(second) == list(range(50))
    assert not np.array_equal(first, second)


def test_integers_stay_below_the_limit() -> None:
    draw = Draw(seed=0, stream="caption")

    assert {draw.integer(step, 0, 3) for step in range(100)} == {0, 1, 2}


@pytest.mark.parametrize(("step", "position", "name"), [(-1, 0, "step -1"), (0, 2**64, f"position {2**64}")])
def test_refuses_coordinates_outside_the_counter(step: int, position: int, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Draw(seed=0, stream="noise").normal(step, position, (1,))
