"""The outbox: everything once, in order, in reports of bounded size."""

from reverie.training.v1.job_pb2 import StepMetrics
from reverie_trainer.worker.outbox import MAX_EVENTS, Outbox


def test_an_empty_outbox_has_nothing_to_say() -> None:
    assert not Outbox().take()


def test_events_leave_once_and_in_order() -> None:
    outbox = Outbox()
    outbox.step(StepMetrics(step=1))
    outbox.warn("REASON", "what happened")
    report = outbox.take()
    assert [event.WhichOneof("payload") for event in report.events] == ["step", "notice"]
    assert all(event.HasField("time") for event in report.events)
    assert not outbox.take()


def test_a_report_is_bounded() -> None:
    outbox = Outbox()
    for step in range(MAX_EVENTS + 5):
        outbox.step(StepMetrics(step=step))
    assert [len(outbox.take().events) for _ in range(3)] == [MAX_EVENTS, 5, 0]


def test_phases_add_up_until_they_are_reported() -> None:
    outbox = Outbox()
    outbox.phase("train", 1.5)
    outbox.phase("train", 0.5)
    with outbox.timed("finish"):
        pass
    phases = {phase.name: phase.seconds for phase in outbox.take().phases}
    assert phases["train"] == 2.0
    assert 0 <= phases["finish"] < 1
    assert not outbox.take()


def test_the_adapter_is_reported_once() -> None:
    outbox = Outbox()
    outbox.adapter(num_modules=3, num_parameters=99)
    adapter = outbox.take().adapter
    assert adapter is not None
    assert (adapter.num_modules, adapter.num_parameters) == (3, 99)
    assert outbox.take().adapter is None
