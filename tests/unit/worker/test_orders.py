"""Orders: the stronger one holds."""

import pytest
from reverie_trainer.worker.orders import Order, Orders


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], Order.GO_ON),
        ([Order.STOP], Order.STOP),
        ([Order.STOP, Order.LEAVE], Order.LEAVE),
        ([Order.LEAVE, Order.STOP], Order.LEAVE),
        ([Order.DESERT, Order.STOP], Order.DESERT),
    ],
)
def test_the_strongest_order_holds(given: list[Order], expected: Order) -> None:
    orders = Orders()
    for order in given:
        orders.give(order, f"because of {order.name}")
    assert orders.current is expected
    assert orders.why == (f"because of {expected.name}" if given else "")


def test_pictures_are_drawn_once_for_each_time_that_people_asked() -> None:
    orders = Orders()
    orders.note_picture_requests(2, are_new=False)
    assert not orders.take_picture_request()
    orders.note_picture_requests(3)
    assert orders.take_picture_request()
    assert not orders.take_picture_request()
    orders.note_picture_requests(3)
    assert not orders.take_picture_request()
