"""When a model is parked and fetched: real clocks, a recorded model."""

import threading
from time import monotonic

import pytest
from reverie_common.concurrency import Parking


class RecordedModel:
    """Writes down what happens to it."""

    def __init__(self) -> None:
        self.moves: list[str] = []
        self.moved = threading.Event()
        self.is_full = False

    def to_host(self) -> None:
        self.moves.append("host")
        self.moved.set()

    def to_device(self) -> None:
        if self.is_full:
            raise MemoryError("the device is full")
        self.moves.append("device")


def make(idle_seconds: float) -> tuple[RecordedModel, Parking, list[bool]]:
    told: list[bool] = []
    model = RecordedModel()
    return model, Parking(model, idle_seconds=idle_seconds, on_change=told.append), told


def test_an_idle_model_is_parked_once_and_fetched_for_its_next_use() -> None:
    model, parking, told = make(0.02)
    assert model.moved.wait(5)
    with parking.in_use():
        assert model.moves == ["host", "device"]
        assert not parking.is_parked
    model.moved.clear()
    assert model.moved.wait(5)
    parking.close()
    assert model.moves == ["host", "device", "host"]
    assert told == [True, False, True]


def test_use_puts_parking_off() -> None:
    model, parking, _ = make(0.3)
    started = monotonic()
    while monotonic() < started + 0.6:
        with parking.in_use():
            pass
    assert model.moves == []
    last = monotonic()
    assert model.moved.wait(5)
    assert monotonic() - last >= 0.25
    parking.close()


def test_what_is_in_use_is_not_parked() -> None:
    model, parking, _ = make(0.01)
    with parking.in_use(), parking.in_use():
        assert not parking.release()
        assert not model.moved.wait(0.1)
    assert model.moved.wait(5)
    parking.close()


def test_without_a_time_it_is_parked_when_told_to() -> None:
    model, parking, told = make(0)
    assert not model.moved.wait(0.05)
    assert parking.release()
    assert parking.release()
    assert model.moves == ["host"]
    assert told == [True]
    parking.close()


def test_a_full_device_leaves_it_parked_for_the_next_try() -> None:
    model, parking, told = make(0)
    parking.release()
    model.is_full = True
    with pytest.raises(MemoryError), parking.in_use():
        pass
    assert parking.is_parked
    model.is_full = False
    with parking.in_use():
        assert model.moves == ["host", "device"]
    assert told == [True, False]


def test_a_closed_one_does_not_park_by_itself() -> None:
    model, parking, _ = make(0.05)
    parking.close()
    parking.close()
    assert not model.moved.wait(0.15)
