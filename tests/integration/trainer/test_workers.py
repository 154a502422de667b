"""What workers may tell the trainer, call by call."""

import asyncio
from typing import Any

import pytest
from reverie.common.v1 import common_pb2
from reverie.training.v1 import job_pb2, training_pb2
from reverie_common.errors import (
    AbortedError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
)
from reverie_common.rpc.channel import translated
from reverie_common.storage.keys import checkpoint_manifest_key

CATS = [("512x512 a", ["a cat"])]


@pytest.fixture
async def handed_over(start_trainer: Any, make_spec: Any, worker_token: Any) -> tuple[Any, str, str]:
    """A trainer, a job whose worker does nothing by itself, and that worker's secret."""
    trainer = await start_trainer(worker_module="idle_worker")
    await trainer.add_dataset("idle", CATS)
    job_id = (await trainer.submit(make_spec("idle"))).job_id
    await trainer.until(job_id, lambda job: job.num_worker_starts == 1)
    return trainer, job_id, await worker_token(job_id)


async def lease(trainer: Any, job_id: str, token: str) -> training_pb2.LeaseJobResponse:
    request = training_pb2.LeaseJobRequest(job_id=job_id, worker_id="test", worker_token=token)
    response: training_pb2.LeaseJobResponse = await trainer.workers.LeaseJob(request)
    return response


async def report(trainer: Any, lease_id: str, number: int, *steps: int) -> bool:
    events = [job_pb2.TrainingJobEvent(step=job_pb2.StepMetrics(step=step)) for step in steps]
    request = training_pb2.ReportProgressRequest(lease_id=lease_id, report_sequence=number, events=events)
    should_stop: bool = (await trainer.workers.ReportProgress(request)).should_stop
    return should_stop


async def test_lease_needs_the_secret_of_the_newest_worker(handed_over: Any) -> None:
    trainer, job_id, token = handed_over
    with pytest.raises(PermissionDeniedError) as caught, translated():
        await lease(trainer, job_id, "guessed")
    assert caught.value.reason == "WRONG_WORKER_TOKEN"
    given = await lease(trainer, job_id, token)
    assert given.job.job_id == job_id
    assert given.prepared.uri
    assert given.lease_seconds == 60.0
    assert not given.HasField("checkpoint")
    with pytest.raises(NotFoundError), translated():
        await lease(trainer, "job-none", token)


async def test_newer_lease_ends_the_older_one(handed_over: Any) -> None:
    trainer, job_id, token = handed_over
    old = await lease(trainer, job_id, token)
    new = await lease(trainer, job_id, token)
    with pytest.raises(AbortedError) as caught, translated():
        await report(trainer, old.lease_id, 1, 1)
    assert caught.value.reason == "LEASE_LOST"
    assert not await report(trainer, new.lease_id, 1, 1)


async def test_repeated_report_is_recorded_once(handed_over: Any) -> None:
    trainer, job_id, token = handed_over
    lease_id = (await lease(trainer, job_id, token)).lease_id
    await report(trainer, lease_id, 1, 1, 2)
    before = await trainer.get(job_id)
    await report(trainer, lease_id, 1, 1, 2)
    assert await trainer.get(job_id) == before
    await report(trainer, lease_id, 2, 3)
    assert (await trainer.get(job_id)).step == 3


async def test_lease_names_the_newest_checkpoint_in_the_store(handed_over: Any) -> None:
    trainer, job_id, token = handed_over
    for step in (5, 10):
        trainer.store.create(checkpoint_manifest_key(job_id, step), b'{"step": %d}' % step)
    reference = (await lease(trainer, job_id, token)).checkpoint
    body = await asyncio.to_thread(trainer.store.get, trainer.store.key_of(reference.uri), sha256=reference.sha256)
    assert body == b'{"step": 10}'


async def test_event_that_is_not_a_workers_is_refused(handed_over: Any) -> None:
    trainer, job_id, token = handed_over
    lease_id = (await lease(trainer, job_id, token)).lease_id
    event = job_pb2.TrainingJobEvent(state_changed=job_pb2.StateChanged())
    request = training_pb2.ReportProgressRequest(lease_id=lease_id, report_sequence=1, events=[event])
    with pytest.raises(InvalidArgumentError) as caught, translated():
        await trainer.workers.ReportProgress(request)
    assert caught.value.violations[0].field == "events[0]"


async def test_completion_says_enough_and_ends_the_lease(handed_over: Any) -> None:
    trainer, job_id, token = handed_over
    lease_id = (await lease(trainer, job_id, token)).lease_id
    empty = training_pb2.CompleteJobRequest(lease_id=lease_id, outcome=training_pb2.WORKER_OUTCOME_SUCCEEDED)
    with pytest.raises(InvalidArgumentError), translated():
        await trainer.workers.CompleteJob(empty)
    done = training_pb2.CompleteJobRequest(
        lease_id=lease_id,
        outcome=training_pb2.WORKER_OUTCOME_SUCCEEDED,
        adapter=common_pb2.ObjectRef(uri="s3://b/adapter"),
    )
    await trainer.workers.CompleteJob(done)
    assert (await trainer.get(job_id)).adapter.uri == "s3://b/adapter"
    with pytest.raises(AbortedError), translated():
        await trainer.workers.CompleteJob(done)
    with pytest.raises(FailedPreconditionError), translated():
        await lease(trainer, job_id, token)


async def test_the_running_average_is_kept_and_listed_beside_the_adapter(handed_over: Any) -> None:
    trainer, job_id, token = handed_over
    lease_id = (await lease(trainer, job_id, token)).lease_id
    picture = common_pb2.ObjectRef(uri=trainer.store.uri("picture"))
    drawn = job_pb2.ValidationImage(step=3, prompt_name="cat", width=64, height=64, weights="ema", image=picture)
    await trainer.workers.ReportProgress(
        training_pb2.ReportProgressRequest(
            lease_id=lease_id, report_sequence=1, events=[job_pb2.TrainingJobEvent(validation_image=drawn)]
        )
    )
    average = common_pb2.ObjectRef(uri=trainer.store.uri("average"))
    await trainer.workers.CompleteJob(
        training_pb2.CompleteJobRequest(
            lease_id=lease_id,
            outcome=training_pb2.WORKER_OUTCOME_SUCCEEDED,
            adapter=common_pb2.ObjectRef(uri=trainer.store.uri("plain")),
            ema_adapter=average,
        )
    )
    listed = await trainer.training.ListArtifacts(training_pb2.ListArtifactsRequest(job_id=job_id))
    assert (await trainer.get(job_id)).ema_adapter == average
    assert {artifact.path for artifact in listed.artifacts} == {
        "adapter/ema_pytorch_lora_weights.safetensors",
        "adapter/pytorch_lora_weights.safetensors",
        "validation/step_3_cat_0_64x64_ema.png",
    }


async def test_worker_of_a_cancelled_job_is_told_to_stop(handed_over: Any) -> None:
    trainer, job_id, token = handed_over
    lease_id = (await lease(trainer, job_id, token)).lease_id
    assert not await report(trainer, lease_id, 1)
    await trainer.training.CancelTrainingJob(training_pb2.CancelTrainingJobRequest(job_id=job_id))
    assert await report(trainer, lease_id, 2)
    stopped = training_pb2.CompleteJobRequest(lease_id=lease_id, outcome=training_pb2.WORKER_OUTCOME_STOPPED)
    await trainer.workers.CompleteJob(stopped)
    assert (await trainer.get(job_id)).state == job_pb2.TRAINING_JOB_STATE_CANCELLED


async def test_worker_that_stays_after_its_job_is_killed(handed_over: Any, worker_pids: Any) -> None:
    trainer, job_id, token = handed_over
    lease_id = (await lease(trainer, job_id, token)).lease_id
    failure = job_pb2.JobFailure(reason="BROKEN", message="broken")
    await trainer.workers.CompleteJob(
        training_pb2.CompleteJobRequest(lease_id=lease_id, outcome=training_pb2.WORKER_OUTCOME_FAILED, failure=failure)
    )
    assert worker_pids(job_id)
    await worker_pids.gone(job_id)
