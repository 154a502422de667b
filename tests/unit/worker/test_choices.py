"""What chance decides: by counter, at the rates asked for."""

import numpy as np
import pytest
from reverie_trainer.worker.choices import Chance
from reverie_trainer.worker.schedule import Visit

SHA = "ab" * 32


def _visit(step: int = 1, position: int = 0) -> Visit:
    return Visit(sample=0, step=step, position=position)


def test_the_same_visit_draws_the_same() -> None:
    first, second = Chance(seed=42), Chance(seed=42)
    assert first.caption(_visit(3, 1), [1] * 1000) == second.caption(_visit(3, 1), [1] * 1000)
    assert np.array_equal(first.posterior(_visit(3, 1), SHA, (4,)), second.posterior(_visit(3, 1), SHA, (4,)))


@pytest.mark.parametrize("other", [_visit(4, 1), _visit(3, 2)], ids=["step", "position"])
def test_another_visit_draws_something_else(other: Visit) -> None:
    chance = Chance(seed=42)
    assert chance.caption(other, [1] * 1000) != chance.caption(_visit(3, 1), [1] * 1000)


def test_captions_are_dropped_at_the_rate_asked_for() -> None:
    chance = Chance(seed=1, caption_dropout_probability=0.25)
    dropped = sum(chance.caption(_visit(step), [1, 1, 1]) is None for step in range(1, 2001))
    assert 0.22 < dropped / 2000 < 0.28


def test_every_caption_has_its_turn() -> None:
    chance = Chance(seed=1)
    chosen = [chance.caption(_visit(step), [1, 1, 1]) for step in range(1, 301)]
    assert {choice: chosen.count(choice) > 70 for choice in [(0, 0), (1, 0), (2, 0)]} == dict.fromkeys(
        [(0, 0), (1, 0), (2, 0)], True
    )


@pytest.mark.parametrize(("probability", "expected"), [(0.0, (0, 0)), (1.0, None)])
def test_the_ends_of_the_dropout_range_are_certain(probability: float, expected: tuple[int, int] | None) -> None:
    chance = Chance(seed=1, caption_dropout_probability=probability)
    assert {chance.caption(_visit(step), [1]) for step in range(1, 200)} == {expected}


def test_every_order_of_a_caption_has_its_turn_whatever_the_number_of_the_others() -> None:
    chance = Chance(seed=1)
    chosen = [chance.caption(_visit(step), [8, 1]) for step in range(1, 2001)]
    assert set(chosen) == {*((0, order) for order in range(8)), (1, 0)}
    assert 900 < chosen.count((1, 0)) < 1100
    assert all(80 < chosen.count((0, order)) < 170 for order in range(8))


def test_a_latent_drawn_once_is_that_of_the_image() -> None:
    chance = Chance(seed=1, sample_latents_once=True)
    first = chance.posterior(_visit(1), SHA, (4,))
    assert np.array_equal(first, chance.posterior(_visit(9, 3), SHA, (4,)))
    assert not np.array_equal(first, chance.posterior(_visit(1), "cd" * 32, (4,)))


def test_a_latent_is_drawn_anew_at_each_visit_otherwise() -> None:
    chance = Chance(seed=1)
    assert not np.array_equal(chance.posterior(_visit(1), SHA, (4,)), chance.posterior(_visit(2), SHA, (4,)))
