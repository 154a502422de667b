"""A whole job with a running average and an optimiser that averages by itself, through the worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from reverie.common.v1.common_pb2 import ObjectRef
from reverie.training.v1.training_pb2 import WORKER_OUTCOME_STOPPED, WORKER_OUTCOME_SUCCEEDED
from reverie_common.storage import get_object, put_object, read_metadata, unpack_tensors
from reverie_common.storage.keys import checkpoint_manifest_key

Work = Callable[..., int]


def test_the_average_is_exported_beside_the_adapter(prepared: Any, work: Work) -> None:
    trainer = prepared.trainer(name="job-average", ema={"decay": 0.9})
    assert work(trainer) == 0
    completion = trainer.completions[0]
    adapter, average = (get_object(prepared.store, ref) for ref in (completion.adapter, completion.ema_adapter))

    assert completion.ema_adapter.uri.rsplit("/", 1)[-1] != completion.adapter.uri.rsplit("/", 1)[-1]
    assert unpack_tensors(adapter).keys() == unpack_tensors(average).keys()
    assert adapter != average
    assert read_metadata(adapter)["global_step"] == read_metadata(average)["global_step"] == "6"


def test_a_job_without_an_average_exports_none(prepared: Any, work: Work) -> None:
    trainer = prepared.trainer(name="job-no-average")
    work(trainer)

    assert not trainer.completions[0].HasField("ema_adapter")


@pytest.mark.parametrize(
    "optimization",
    [
        {"optimizer": "adamw_schedulefree"},
        {"optimizer": "adamw_bf16", "lr_scheduler": "cosine", "gradient_release": True},
    ],
    ids=lambda optimization: str(optimization["optimizer"]),
)
def test_a_job_that_was_stopped_ends_in_the_same_bytes(prepared: Any, work: Work, optimization: dict[str, Any]) -> None:
    name = f"job-ema-{optimization['optimizer'].replace('_', '-')}"
    changes = {"optimization": optimization, "ema": {"decay": 0.9}}
    straight = prepared.trainer(name=f"{name}-straight", **changes)
    work(straight)
    stopped = prepared.trainer(name=f"{name}-stopped", **changes)
    stopped.job.spec.name = straight.job.spec.name

    def stop(event: Any) -> None:
        stopped.should_stop = event.step.step >= 3 or stopped.should_stop

    stopped.on_event = stop
    work(stopped)
    assert stopped.completions[0].outcome == WORKER_OUTCOME_STOPPED
    last = stopped.of_kind("checkpoint")[-1].step
    stopped.should_stop, stopped.checkpoint = False, manifest_of(prepared, f"{name}-stopped", last)
    stopped.on_event = lambda _: None
    work(stopped)

    assert stopped.completions[1].outcome == WORKER_OUTCOME_SUCCEEDED
    assert stopped.completions[1].adapter.sha256 == straight.completions[0].adapter.sha256
    assert stopped.completions[1].ema_adapter.sha256 == straight.completions[0].ema_adapter.sha256


def manifest_of(prepared: Any, job_id: str, step: int) -> ObjectRef:
    key = checkpoint_manifest_key(job_id, step)
    return put_object(prepared.store, key, prepared.store.get(key), "application/json")
