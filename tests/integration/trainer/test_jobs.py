"""A job from submission to rest, over real gRPC, with a real store and a real database."""

import json
import os
import signal
import uuid
from typing import Any

import pytest
from reverie.training.v1 import job_pb2, training_pb2
from reverie_common.errors import AlreadyExistsError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from reverie_common.rpc.channel import translated

CATS = [("512x512 a", ["a cat"]), ("640x448 b", ["a red cat"]), ("640x448 c", ["a cat"])]


def kinds(events: list[job_pb2.TrainingJobEvent]) -> list[str | None]:
    return [event.WhichOneof("payload") for event in events]


async def test_job_runs_to_success_and_its_history_has_no_gaps(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("success", CATS)
    job = await trainer.submit(make_spec("success", "steps=3"))
    events = await trainer.watch(job.job_id)
    final = events[-1].snapshot
    assert kinds(events)[0] == kinds(events)[-1] == "snapshot"
    assert [event.sequence for event in events[1:-1]] == list(range(1, final.last_sequence + 1))
    states = [event.state_changed.to_state for event in events if event.HasField("state_changed")]
    assert states == [
        job_pb2.TRAINING_JOB_STATE_QUEUED,
        job_pb2.TRAINING_JOB_STATE_PREPARING,
        job_pb2.TRAINING_JOB_STATE_TRAINING,
        job_pb2.TRAINING_JOB_STATE_SUCCEEDED,
    ]
    assert [event.step.step for event in events if event.HasField("step")] == [1, 2, 3]
    assert final == await trainer.get(job.job_id)


async def test_finished_job_tells_what_it_did(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("report", CATS)
    final = await trainer.finish((await trainer.submit(make_spec("report", "steps=3"))).job_id)
    assert (final.step, final.metrics.step, final.num_worker_starts) == (3, 3, 1)
    assert final.adapter_report.num_modules == 24
    assert {phase.name for phase in final.phases} == {"prepare", "start_worker", "train"}
    assert final.HasField("start_time")
    assert final.HasField("end_time")
    assert final.adapter.uri
    assert (final.preparation.num_images, final.preparation.num_prompts) == (3, 3)
    assert final.preparation.samples_per_epoch == 3
    assert [(item.width, item.height, item.num_images) for item in final.preparation.buckets] == [
        (320, 192, 2),
        (256, 256, 1),
    ]


async def test_artifacts_come_with_urls_and_in_pages(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("artifacts", CATS)
    job_id = (await trainer.finish((await trainer.submit(make_spec("artifacts", "steps=2"))).job_id)).job_id
    paths, token = [], ""
    for _ in range(3):
        request = training_pb2.ListArtifactsRequest(job_id=job_id, page_size=2, page_token=token)
        page = await trainer.training.ListArtifacts(request)
        paths += [artifact.path for artifact in page.artifacts]
        assert all(artifact.download_url.startswith("http://") for artifact in page.artifacts)
        token = page.next_page_token
    assert token == ""
    assert paths == [
        "adapter/lycoris_config.json",
        "adapter/pytorch_lora_weights.safetensors",
        "metrics.jsonl",
        "validation/step_1_cat_0_64x64.png",
        "validation/step_2_cat_0_64x64.png",
    ]


async def test_checkpoints_are_listed_newest_first_and_kept_as_asked(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("checkpoints", CATS)
    spec = make_spec("checkpoints", "steps=5", checkpoints=job_pb2.CheckpointSpec(keep=3))
    job_id = (await trainer.finish((await trainer.submit(spec)).job_id)).job_id
    first = await trainer.training.ListCheckpoints(training_pb2.ListCheckpointsRequest(job_id=job_id, page_size=2))
    rest = await trainer.training.ListCheckpoints(
        training_pb2.ListCheckpointsRequest(job_id=job_id, page_token=first.next_page_token)
    )
    assert [item.step for item in first.checkpoints] == [5, 4]
    assert [item.step for item in rest.checkpoints] == [3]
    assert rest.next_page_token == ""


async def test_watch_goes_on_after_a_sequence_number(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("cursor", CATS)
    job = await trainer.finish((await trainer.submit(make_spec("cursor"))).job_id)
    events = await trainer.watch(job.job_id, after_sequence=job.last_sequence - 2)
    assert kinds(events)[0] == kinds(events)[-1] == "snapshot"
    assert [event.sequence for event in events[1:-1]] == [job.last_sequence - 1, job.last_sequence]


async def test_second_job_on_the_same_data_encodes_nothing(trainer: Any, make_spec: Any, neighbours: Any) -> None:
    await trainer.add_dataset("again", CATS)
    await trainer.finish((await trainer.submit(make_spec("again"))).job_id)
    neighbours.encoder.encoded.clear()
    neighbours.vae.plans.clear()
    neighbours.vae.num_inspected = 0
    report = (await trainer.finish((await trainer.submit(make_spec("again", seed=7))).job_id)).preparation
    assert (neighbours.encoder.encoded, neighbours.vae.plans, neighbours.vae.num_inspected) == ([], [], 0)
    assert (report.num_images_cached, report.num_prompts_cached) == (report.num_images, report.num_prompts) == (3, 3)


async def test_worker_gets_the_prepared_samples(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("manifest", CATS)
    job = await trainer.submit(make_spec("manifest", "steps=9", "hang=1"))
    await trainer.until(job.job_id, lambda job: job.num_worker_starts == 1)
    keys = [info.key for info in trainer.store.list("v1/prepared/")]
    manifests = [json.loads(trainer.store.get(key)) for key in keys]
    manifest = next(item for item in manifests if item["datasets"][0]["dataset"] == "manifest")
    assert [(sample["name"], sample["width"], sample["height"]) for sample in manifest["samples"]] == [
        ("000.png", 256, 256),
        ("001.png", 320, 192),
        ("002.png", 320, 192),
    ]
    assert set(manifest["samples"][0]["captions"][0][0]["embeddings"]) == {"clip_l", "clip_g", "t5", "llama"}
    assert set(manifest["empty_caption"]["embeddings"]) == {"clip_l", "clip_g", "t5", "llama"}
    assert manifest["format"] == 2


async def test_jobs_wait_for_their_turn(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("turn", CATS)
    first = await trainer.submit(make_spec("turn", "steps=2", "slow=0.2"))
    second = await trainer.submit(make_spec("turn"))
    await trainer.until(first.job_id, lambda job: job.state == job_pb2.TRAINING_JOB_STATE_TRAINING)
    assert (await trainer.get(second.job_id)).state == job_pb2.TRAINING_JOB_STATE_QUEUED
    begun, ended = await trainer.finish(second.job_id), await trainer.get(first.job_id)
    assert begun.start_time.ToNanoseconds() >= ended.end_time.ToNanoseconds()


async def test_jobs_are_listed_newest_first_in_pages_and_by_state(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("list", CATS)
    done = await trainer.finish((await trainer.submit(make_spec("list"))).job_id)
    waiting = [(await trainer.submit(make_spec("list", "steps=2", "slow=60"))).job_id for _ in range(3)]
    first = await trainer.training.ListTrainingJobs(training_pb2.ListTrainingJobsRequest(page_size=2))
    rest = await trainer.training.ListTrainingJobs(
        training_pb2.ListTrainingJobsRequest(page_size=20, page_token=first.next_page_token)
    )
    assert [job.job_id for job in [*first.jobs, *rest.jobs]] == [*reversed(waiting), done.job_id]
    assert rest.next_page_token == ""
    succeeded = await trainer.training.ListTrainingJobs(
        training_pb2.ListTrainingJobsRequest(states=[job_pb2.TRAINING_JOB_STATE_SUCCEEDED])
    )
    assert [job.job_id for job in succeeded.jobs] == [done.job_id]


async def test_request_id_makes_submission_repeatable(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("repeat", CATS)
    request_id = str(uuid.uuid4())
    first = await trainer.submit(make_spec("repeat"), request_id)
    assert (await trainer.submit(make_spec("repeat"), request_id)).job_id == first.job_id
    with pytest.raises(AlreadyExistsError, match=first.job_id), translated():
        await trainer.submit(make_spec("repeat", seed=1), request_id)
    assert (await trainer.submit(make_spec("repeat"))).job_id != first.job_id


async def test_every_violation_is_told_at_once(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("violations", CATS)
    await trainer.add_dataset("uncaptioned", [("64x64", []), ("65x64", ["a cat"])])
    await trainer.add_dataset("hollow", [])
    spec = make_spec("violation", name="Bad Name")
    spec.optimization.optimizer = "adam"
    spec.optimization.learning_rate = float("nan")
    spec.optimization.batch_size = 8
    spec.adapter.lokr.apply_preset.target_module.append("Atention")
    spec.datasets.add(dataset="violations", resolution=0)
    spec.datasets.add(dataset="uncaptioned", repeats=3)
    spec.datasets.add(dataset="hollow")
    with pytest.raises(InvalidArgumentError) as caught, translated():
        await trainer.submit(spec)
    found = {violation.field: violation.description for violation in caught.value.violations}
    assert "did you mean 'adamw'" in found["optimization.optimizer"]
    assert "nan" in found["optimization.learning_rate"]
    assert "did you mean 'violations'" in found["datasets[0].dataset"]
    assert "Minimum repeats required: 2" in found["datasets[1].repeats"]
    assert "'000.png'" in found["datasets[2].instance_prompt"]
    assert "no images detected in dataset 'hollow'" in found["datasets[3].dataset"]
    assert "'Atention'" in found["adapter.lokr.apply_preset"]
    assert {"name", "datasets[1].resolution"} <= found.keys()


async def test_picture_larger_than_the_canvas_is_refused_unless_square(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("canvas", CATS)
    prompts = [job_pb2.ValidationPrompt(name="cat", prompt="a cat")]
    validation = job_pb2.ValidationSpec(prompts=prompts, resolutions=["512x512", "256x512"])
    with pytest.raises(InvalidArgumentError) as caught, translated():
        await trainer.submit(make_spec("canvas", validation=validation))
    assert [violation.field for violation in caught.value.violations] == ["validation.resolutions[1]"]


async def test_unknown_job_is_not_found(trainer: Any) -> None:
    with pytest.raises(NotFoundError, match="job-none") as caught, translated():
        await trainer.get("job-none")
    assert caught.value.reason == "JOB_NOT_FOUND"
    with pytest.raises(NotFoundError), translated():
        await trainer.watch("job-none")


async def cancel(trainer: Any, job_id: str, request_id: str = "") -> job_pb2.TrainingJob:
    request = training_pb2.CancelTrainingJobRequest(job_id=job_id, request_id=request_id)
    job: job_pb2.TrainingJob = (await trainer.training.CancelTrainingJob(request)).job
    return job


async def resume(trainer: Any, job_id: str, request_id: str = "") -> job_pb2.TrainingJob:
    request = training_pb2.ResumeTrainingJobRequest(job_id=job_id, request_id=request_id)
    job: job_pb2.TrainingJob = (await trainer.training.ResumeTrainingJob(request)).job
    return job


async def test_waiting_job_is_cancelled_at_once(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("waiting", CATS)
    await trainer.submit(make_spec("waiting", "slow=60"))
    waiting = await trainer.submit(make_spec("waiting"))
    assert (await cancel(trainer, waiting.job_id)).state == job_pb2.TRAINING_JOB_STATE_CANCELLED


async def test_cancelled_job_saves_and_resumes_where_it_was(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("resume", CATS)
    job = await trainer.submit(make_spec("resume", "steps=6", "slow=0.1"))
    await trainer.until(job.job_id, lambda job: job.step >= 2)
    request_id = str(uuid.uuid4())
    await cancel(trainer, job.job_id, request_id)
    stopped = await trainer.finish(job.job_id)
    assert stopped.state == job_pb2.TRAINING_JOB_STATE_CANCELLED
    assert (await cancel(trainer, job.job_id, request_id)).state == stopped.state
    assert (await resume(trainer, job.job_id)).state == job_pb2.TRAINING_JOB_STATE_QUEUED
    final = await trainer.finish(job.job_id)
    assert final.state == job_pb2.TRAINING_JOB_STATE_SUCCEEDED
    steps = [event.step.step for event in await trainer.watch(job.job_id) if event.HasField("step")]
    assert steps == [1, 2, 3, 4, 5, 6]


async def test_worker_that_ignores_the_cancellation_is_killed(start_trainer: Any, make_spec: Any) -> None:
    trainer = await start_trainer(worker_stop_seconds=0.3)
    await trainer.add_dataset("stubborn", CATS)
    job = await trainer.submit(make_spec("stubborn", "steps=900", "slow=0.1", "stubborn"))
    await trainer.until(job.job_id, lambda job: job.step >= 1)
    await cancel(trainer, job.job_id)
    assert (await trainer.finish(job.job_id)).state == job_pb2.TRAINING_JOB_STATE_CANCELLED


async def test_job_at_rest_is_neither_cancelled_nor_resumed(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("rest", CATS)
    job = await trainer.finish((await trainer.submit(make_spec("rest"))).job_id)
    with pytest.raises(FailedPreconditionError) as caught, translated():
        await cancel(trainer, job.job_id)
    assert caught.value.metadata["state"] == "SUCCEEDED"
    with pytest.raises(FailedPreconditionError), translated():
        await resume(trainer, job.job_id)


async def test_worker_that_dies_is_replaced(trainer: Any, make_spec: Any, worker_pids: Any) -> None:
    await trainer.add_dataset("killed", CATS)
    job = await trainer.submit(make_spec("killed", "steps=5", "slow=0.1"))
    await trainer.until(job.job_id, lambda job: job.step >= 2)
    os.kill(worker_pids(job.job_id)[0], signal.SIGKILL)
    final = await trainer.finish(job.job_id)
    assert (final.state, final.num_worker_starts) == (job_pb2.TRAINING_JOB_STATE_SUCCEEDED, 2)
    notices = [event.notice.reason for event in await trainer.watch(job.job_id) if event.HasField("notice")]
    assert notices == ["WORKER_LOST"]


async def test_job_whose_workers_make_no_progress_fails_with_their_log(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("crash", CATS)
    final = await trainer.finish((await trainer.submit(make_spec("crash", "steps=5", "crash=2"))).job_id)
    assert (final.state, final.step) == (job_pb2.TRAINING_JOB_STATE_FAILED, 1)
    assert final.failure.reason == "WORKER_CRASHED"
    assert "out of memory at step 2" in final.failure.message
    assert final.num_worker_starts == 4


async def test_silent_worker_loses_its_lease(start_trainer: Any, make_spec: Any) -> None:
    trainer = await start_trainer(lease_seconds=0.5, max_starts_without_progress=1)
    await trainer.add_dataset("silent", CATS)
    final = await trainer.finish((await trainer.submit(make_spec("silent", "steps=5", "hang=1"))).job_id)
    assert final.failure.reason == "WORKER_CRASHED"
    assert "silent" in final.failure.message


async def test_failure_of_the_worker_is_the_jobs(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("nan", CATS)
    final = await trainer.finish((await trainer.submit(make_spec("nan", "steps=5", "fail=2"))).job_id)
    assert final.failure == job_pb2.JobFailure(reason="NOT_FINITE", message="loss is nan", remedy="lower the rate")
    assert final.num_worker_starts == 1


async def test_warm_worker_takes_the_job(start_trainer: Any, make_spec: Any, worker_pids: Any) -> None:
    trainer = await start_trainer(standby_workers=1)
    warm = await worker_pids.standby()
    await trainer.add_dataset("warm", CATS)
    job = await trainer.submit(make_spec("warm", "steps=3", "slow=0.2"))
    await trainer.until(job.job_id, lambda job: job.step >= 1)
    assert worker_pids(job.job_id) == [warm]
    assert (await trainer.finish(job.job_id)).state == job_pb2.TRAINING_JOB_STATE_SUCCEEDED
