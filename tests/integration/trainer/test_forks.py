"""Beginning at another job's checkpoint, going back to an earlier one of one's own, asking for pictures now."""

import json
from typing import Any

import pytest
from reverie.training.v1 import job_pb2, training_pb2
from reverie_common.errors import FailedPreconditionError, InvalidArgumentError, ReverieError
from reverie_common.rpc.channel import translated
from reverie_common.storage import RawTensor, unpack_tensors
from reverie_common.storage.keys import checkpoint_manifest_key
from reverie_trainer.jobs.state.checkpoints import checkpoint_steps
from reverie_trainer.worker.checkpoints import CheckpointContents, write_checkpoint

CATS = [("300x200", ["a cat"]), ("310x210", ["two cats"])]
VALIDATION = job_pb2.ValidationSpec(
    prompts=[job_pb2.ValidationPrompt(name="cat", prompt="a cat")], resolutions=["64x64"]
)


def save(trainer: Any, job_id: str, step: int) -> bytes:
    """Save a checkpoint as a worker does; returns the tensor in its state."""
    tensor = step.to_bytes(4, "little")
    contents = CheckpointContents(
        step=step,
        adapter_file=b"adapter %d" % step,
        state={"adapter/x": RawTensor(dtype="F32", shape=(1,), data=tensor)},
        metrics=b'{"step": %d}\n' % step,
        scalars={"pictures": [{"step": step, "adapter": None}], "kept": 1},
    )
    write_checkpoint(trainer.store, job_id, contents)
    return tensor


async def submit_finished(trainer: Any, spec: job_pb2.TrainingJobSpec, *steps: int) -> str:
    job_id: str = (await trainer.submit(spec)).job_id
    assert (await trainer.finish(job_id)).state != job_pb2.TRAINING_JOB_STATE_FAILED
    for step in steps:
        save(trainer, job_id, step)
    return job_id


async def fork(trainer: Any, job_id: str, **fields: Any) -> job_pb2.TrainingJob:
    request = training_pb2.ForkTrainingJobRequest(job_id=job_id, **fields)
    with translated():
        job: job_pb2.TrainingJob = (await trainer.training.ForkTrainingJob(request)).job
    return job


def manifest(trainer: Any, job_id: str, step: int) -> Any:
    return json.loads(trainer.store.get(checkpoint_manifest_key(job_id, step)))


async def test_fork_begins_at_the_others_newest_checkpoint_with_objects_of_its_own(
    trainer: Any, make_spec: Any
) -> None:
    await trainer.add_dataset("forked", CATS)
    source = await submit_finished(trainer, make_spec("forked"), 1, 2)
    longer = make_spec("forked", optimization=job_pb2.OptimizationSpec(max_steps=9))
    job = await fork(trainer, source, spec=longer)
    assert (job.spec.start.job_id, job.spec.start.step, job.spec.optimization.max_steps) == (source, 2, 9)
    record = manifest(trainer, job.job_id, 2)
    assert record["scalars"] == {"kept": 1, "start": {"job_id": source, "step": 2, "adapter_only": False}}
    assert all(job.job_id in part["uri"] for part in record["parts"].values())
    state = unpack_tensors(trainer.store.get(trainer.store.key_of(record["parts"]["state"]["uri"])))
    assert bytes(state["adapter/x"].data) == (2).to_bytes(4, "little")


async def test_fork_of_a_job_of_epochs_is_as_long_as_that_was_asked_for(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("epochs-fork", CATS)
    spec = make_spec("epochs-fork")
    spec.optimization.max_steps, spec.optimization.num_epochs = 0, 2
    source = await submit_finished(trainer, spec, 1)
    # The source has its steps filled in, which is not what was asked for.
    assert (await trainer.get(source)).spec.optimization.max_steps > 0
    job = await fork(trainer, source)
    assert (job.spec.optimization.max_steps, job.spec.optimization.num_epochs) == (0, 2)


async def test_worker_of_a_fork_is_given_its_start(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("lease", CATS)
    source = await submit_finished(trainer, make_spec("lease"), 1, 2)
    job = await fork(trainer, source, step=1)
    assert checkpoint_steps(trainer.store, job.job_id) == [1]


async def test_adapter_alone_counts_as_step_0(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("alone", CATS)
    source = await submit_finished(trainer, make_spec("alone"), 2)
    job = await fork(trainer, source, adapter_only=True)
    assert checkpoint_steps(trainer.store, job.job_id) == [0]
    assert manifest(trainer, job.job_id, 0)["scalars"]["start"]["adapter_only"]


async def test_start_in_a_job_file_does_the_same(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("file", CATS)
    source = await submit_finished(trainer, make_spec("file"), 2)
    job = await trainer.submit(make_spec("file", start=job_pb2.StartSpec(job_id=source, step=2)))
    assert checkpoint_steps(trainer.store, job.job_id) == [2]


async def test_repeated_fork_is_one_job(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("repeated", CATS)
    source = await submit_finished(trainer, make_spec("repeated"), 2)
    first = await fork(trainer, source, request_id="again")
    assert (await fork(trainer, source, request_id="again")).job_id == first.job_id


@pytest.mark.parametrize(
    ("start", "overrides", "field", "words"),
    [
        ({"step": 7}, {}, "start.step", "there are 1, 2"),
        ({}, {"adapter": job_pb2.AdapterSpec(lokr=job_pb2.LokrSpec(factor=8))}, "adapter", "another one"),
        ({}, {"optimization": job_pb2.OptimizationSpec(optimizer="optimi-lion")}, "optimization.optimizer", "'adamw'"),
        (
            {},
            {"optimization": job_pb2.OptimizationSpec(optimizer_config={"amsgrad": "true"})},
            "optimization.optimizer_config",
            "made with {}",
        ),
        ({}, {"optimization": job_pb2.OptimizationSpec(max_steps=2)}, "optimization.max_steps", "2 steps are done"),
    ],
)
async def test_what_cannot_go_on_is_refused_by_field(
    trainer: Any, make_spec: Any, start: dict[str, int], overrides: dict[str, Any], field: str, words: str
) -> None:
    await trainer.add_dataset("refused", CATS)
    source = await submit_finished(trainer, make_spec("refused"), 1, 2)
    with pytest.raises(InvalidArgumentError) as caught:
        await fork(trainer, source, spec=make_spec("refused", **overrides), **start)
    found = {violation.field: violation.description for violation in caught.value.violations}
    assert list(found) == [field]
    assert words in found[field]


async def test_job_without_a_checkpoint_is_no_start(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("nothing", CATS)
    source = await submit_finished(trainer, make_spec("nothing"))
    with pytest.raises(InvalidArgumentError, match="no checkpoint yet"):
        await fork(trainer, source)


async def cancelled(trainer: Any, spec: job_pb2.TrainingJobSpec) -> str:
    """A job that was cancelled after its fourth step or later, with checkpoints of steps 2 and 4."""
    job_id: str = (await trainer.submit(spec)).job_id
    await trainer.until(job_id, lambda job: job.step >= 4)
    await trainer.training.CancelTrainingJob(training_pb2.CancelTrainingJobRequest(job_id=job_id))
    await trainer.finish(job_id)
    save(trainer, job_id, 2)
    save(trainer, job_id, 4)
    return job_id


async def test_resume_at_an_earlier_step_forgets_what_came_later(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("rewound", CATS)
    job_id = await cancelled(trainer, make_spec("rewound", "steps=9", "slow=0.1"))
    request = training_pb2.ResumeTrainingJobRequest(job_id=job_id, step=2)
    job = (await trainer.training.ResumeTrainingJob(request)).job
    assert (job.state, job.step) == (job_pb2.TRAINING_JOB_STATE_QUEUED, 2)
    assert checkpoint_steps(trainer.store, job_id) == [2]
    assert (await trainer.finish(job_id)).step == 9


async def test_resume_at_a_step_without_checkpoint_changes_nothing(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("unwound", CATS)
    job_id = await cancelled(trainer, make_spec("unwound", "steps=9", "slow=0.1"))
    with pytest.raises(InvalidArgumentError, match="there are 2, 4") as caught, translated():
        await trainer.training.ResumeTrainingJob(training_pb2.ResumeTrainingJobRequest(job_id=job_id, step=3))
    assert caught.value.violations[0].field == "step"
    assert checkpoint_steps(trainer.store, job_id) == [2, 4]
    assert (await trainer.get(job_id)).state == job_pb2.TRAINING_JOB_STATE_CANCELLED


async def test_pictures_are_asked_for_once_per_request(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("pictures", CATS)
    job_id = (await trainer.submit(make_spec("pictures", "steps=900", "slow=0.05", validation=VALIDATION))).job_id
    await trainer.until(job_id, lambda job: job.step >= 1)
    for request_id, expected in (("a", 1), ("a", 1), ("b", 2)):
        request = training_pb2.RequestValidationRequest(job_id=job_id, request_id=request_id)
        job = (await trainer.training.RequestValidation(request)).job
        assert job.num_validation_requests == expected
    await trainer.training.CancelTrainingJob(training_pb2.CancelTrainingJobRequest(job_id=job_id))
    await trainer.finish(job_id)
    with pytest.raises(FailedPreconditionError, match="only a job in TRAINING"), translated():
        await trainer.training.RequestValidation(training_pb2.RequestValidationRequest(job_id=job_id))


async def test_job_without_prompts_has_no_pictures_to_ask_for(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("blind", CATS)
    job_id = (await trainer.submit(make_spec("blind", "steps=900", "slow=0.05"))).job_id
    await trainer.until(job_id, lambda job: job.step >= 1)
    with pytest.raises(ReverieError, match="no validation"), translated():
        await trainer.training.RequestValidation(training_pb2.RequestValidationRequest(job_id=job_id))
