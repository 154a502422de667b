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
