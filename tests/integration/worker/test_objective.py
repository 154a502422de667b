"""A whole job with roll-outs, balance, another loss and other noise levels, through the worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from reverie.common.v1.common_pb2 import ObjectRef
from reverie_common.storage import put_object
from reverie_common.storage.keys import checkpoint_manifest_key

Work = Callable[..., int]

OBJECTIVE: dict[str, Any] = {
    "timestep_sampling": "beta",
    "flow_schedule_auto_shift": True,
    "loss_type": "smooth_l1",
    "input_perturbation": 0.1,
    "input_perturbation_steps": 4,
    "offset_noise": 0.05,
    "use_load_balancing_loss": True,
    "scheduled_sampling": {"max_step_offset": 2, "probability": 0.7, "sampler": "heun", "reflexflow": {"beta1": 1.0}},
}


def test_a_job_that_was_stopped_ends_in_the_same_bytes_and_reports_its_figures(prepared: Any, work: Work) -> None:
    straight = prepared.trainer(name="job-objective", optimization=OBJECTIVE)
    assert work(straight) == 0
    stopped = prepared.trainer(name="job-objective-stopped", optimization=OBJECTIVE)
    stopped.job.spec.name = straight.job.spec.name

    def stop(event: Any) -> None:
        stopped.should_stop = event.step.step >= 3 or stopped.should_stop

    stopped.on_event = stop
    work(stopped)
    last = stopped.of_kind("checkpoint")[-1].step
    key = checkpoint_manifest_key("job-objective-stopped", last)
    stopped.checkpoint = _ref(prepared, key)
    stopped.should_stop, stopped.on_event = False, lambda _: None
    work(stopped)

    assert stopped.completions[1].adapter.sha256 == straight.completions[0].adapter.sha256
    figures = straight.of_kind("step")
    assert len(figures) == 6
    assert all(each.HasField("load_balancing_loss") and each.load_balancing_loss > 0.9 for each in figures)
    assert all(sum(each.expert_load) == pytest.approx(1.0, abs=1e-5) for each in figures)
    assert all(0 < each.router_entropy < 1.3863 for each in figures)
    assert any(each.rollout_share > 0 for each in figures)
    assert all(each.gradient_absmax > 0 for each in figures)
    assert not any(each.HasField("regularisation_loss") for each in figures)


def test_a_plain_job_reports_no_balance_and_no_roll_out(prepared: Any, work: Work) -> None:
    trainer = prepared.trainer(name="job-plain-objective", optimization={"max_steps": 2})
    work(trainer)
    figures = trainer.of_kind("step")
    assert not any(each.HasField("load_balancing_loss") or each.HasField("rollout_share") for each in figures)
    assert all(len(each.expert_load) == 4 and each.HasField("router_entropy") for each in figures)


def _ref(prepared: Any, key: str) -> ObjectRef:
    return put_object(prepared.store, key, prepared.store.get(key), "application/json")
