"""The file of a job's figures: what was measured, and nothing that was not."""

import json

from reverie.training.v1.job_pb2 import StepMetrics
from reverie_trainer.worker.metrics_log import MetricsLog


def _line(figures: StepMetrics) -> dict[str, object]:
    log = MetricsLog()
    log.add(figures)
    line: dict[str, object] = json.loads(log.body())
    return line


def test_leaves_out_what_was_not_measured() -> None:
    line = _line(StepMetrics(step=3, loss=0.5, gradient_absmax=2.0))
    assert (line["step"], line["loss"], line["gradient_absmax"]) == (3, 0.5, 2.0)
    assert not line.keys() & {"load_balancing_loss", "regularisation_loss", "router_entropy", "rollout_share"}
    assert "expert_load" not in line


def test_keeps_zeros_that_were_measured() -> None:
    line = _line(StepMetrics(step=1, regularisation_loss=0.0, rollout_share=0.0, expert_load=[0.25] * 4))
    assert (line["regularisation_loss"], line["rollout_share"]) == (0.0, 0.0)
    assert line["expert_load"] == [0.25] * 4


def test_goes_on_where_a_checkpoint_ended() -> None:
    first = MetricsLog()
    first.add(StepMetrics(step=1))
    second = MetricsLog(first.body())
    second.add(StepMetrics(step=2))
    assert [json.loads(line)["step"] for line in second.body().splitlines()] == [1, 2]


def test_gives_back_the_steps_that_nobody_was_told_of() -> None:
    log = MetricsLog()
    figures = [StepMetrics(step=step, loss=1 / step, rollout_share=0.5, expert_load=[0.5, 0.5]) for step in (1, 2, 3)]
    for each in figures:
        log.add(each)
    assert list(MetricsLog(log.body()).after(1)) == figures[1:]
