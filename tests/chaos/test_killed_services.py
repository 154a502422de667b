"""Every process of the stack is killed in the middle of a job, as a crash would, and started again: no job fails.

What was trained does not show it either: the adapter is, to the last byte, that of a job that nobody disturbed.
"""

from __future__ import annotations

from collections.abc import Callable

import psutil
import pytest
from reverie.training.v1.job_pb2 import TrainingJob, TrainingJobEvent, TrainingJobSpec, TrainingJobState
from reverie_client import SyncReverie
from reverie_client.stack import Stack

PREPARING = TrainingJobState.TRAINING_JOB_STATE_PREPARING
TRAINING = TrainingJobState.TRAINING_JOB_STATE_TRAINING

NUM_STEPS = 12
KILL_AFTER_STEP = 4
NUM_PICTURES, NUM_PROMPTS = 12, 13  # one caption for each picture, and the empty one

MakeDataset = Callable[[str], str]
MakeSpec = Callable[..., TrainingJobSpec]
WaitFor = Callable[[str, Callable[[TrainingJobEvent], bool]], TrainingJobEvent]


def is_amid(stage: str) -> Callable[[TrainingJobEvent], bool]:
    """Says whether an event tells that some but not all of a stage of preparation is done."""
    return lambda event: (
        event.HasField("preparation")
        and event.preparation.stage == stage
        and 0 < event.preparation.num_done < event.preparation.num_total / 2
    )


def is_step(number: int) -> Callable[[TrainingJobEvent], bool]:
    """Says whether an event is of a step of this number or a later one."""
    return lambda event: event.HasField("step") and event.step.step >= number


@pytest.fixture(scope="module")
def spec(make_dataset: MakeDataset, make_spec: MakeSpec) -> TrainingJobSpec:
    """The job that is trained again and again."""
    return make_spec(make_dataset("steady"), num_steps=NUM_STEPS)


@pytest.fixture(scope="module")
def undisturbed(reverie: SyncReverie, spec: TrainingJobSpec) -> TrainingJob:
    """The job as it ends when nobody disturbs it."""
    return reverie.jobs.result(reverie.jobs.submit(spec).job_id)


@pytest.fixture
def training(reverie: SyncReverie, spec: TrainingJobSpec, undisturbed: TrainingJob, wait_for: WaitFor) -> str:
    """The same job once more, in the middle of its training, past a checkpoint."""
    job_id = reverie.jobs.submit(spec).job_id
    wait_for(job_id, is_step(KILL_AFTER_STEP))
    assert reverie.jobs.get(job_id).state == TRAINING
    return job_id


@pytest.mark.parametrize(
    ("service", "stage"),
    [
        ("encoder", "encode_prompts"),
        ("vae", "encode_images"),
        ("store", "encode_prompts"),
        ("trainer", "encode_prompts"),
    ],
)
def test_preparation_survives_a_killed(
    service: str,
    stage: str,
    stack: Stack,
    reverie: SyncReverie,
    make_dataset: MakeDataset,
    make_spec: MakeSpec,
    wait_for: WaitFor,
) -> None:
    job_id = reverie.jobs.submit(make_spec(make_dataset(f"fresh-{service}"), num_steps=1)).job_id
    wait_for(job_id, is_amid(stage))
    stack.kill(service)
    stack.restart(service)
    job = reverie.jobs.result(job_id)
    assert (job.preparation.num_images, job.preparation.num_prompts) == (NUM_PICTURES, NUM_PROMPTS)
    assert not job.preparation.rejected


def test_training_survives_a_killed_worker(
    training: str, worker: Callable[[], psutil.Process], reverie: SyncReverie, undisturbed: TrainingJob
) -> None:
    victim = worker()
    victim.kill()
    job = reverie.jobs.result(training)
    assert job.num_worker_starts == 2
    assert job.adapter.sha256 == undisturbed.adapter.sha256
    assert [step.step for step in reverie.jobs.metrics(training)] == list(range(1, NUM_STEPS + 1))


def test_training_survives_a_killed_trainer(
    training: str, stack: Stack, reverie: SyncReverie, undisturbed: TrainingJob
) -> None:
    stack.kill("trainer")
    stack.restart("trainer")
    job = reverie.jobs.result(training)
    assert job.num_worker_starts == 1  # the worker went on meanwhile
    assert job.adapter.sha256 == undisturbed.adapter.sha256
    assert [step.step for step in reverie.jobs.metrics(training)] == list(range(1, NUM_STEPS + 1))


def test_training_survives_a_killed_store(
    training: str, stack: Stack, reverie: SyncReverie, undisturbed: TrainingJob
) -> None:
    stack.kill("store")
    assert reverie.jobs.get(training).state == TRAINING
    stack.restart("store")
    job = reverie.jobs.result(training)
    assert job.num_worker_starts == 1
    assert job.adapter.sha256 == undisturbed.adapter.sha256
    assert [checkpoint.step for checkpoint in reverie.jobs.checkpoints(training)] == [12, 9]


def test_training_goes_on_without_the_sampler_and_gets_its_pictures_later(
    stack: Stack, reverie: SyncReverie, spec: TrainingJobSpec, undisturbed: TrainingJob, wait_for: WaitFor
) -> None:
    drawing = TrainingJobSpec()
    drawing.CopyFrom(spec)
    drawing.validation.every_steps = 6
    drawing.validation.num_inference_steps = 2
    drawing.validation.resolutions.append("128x128")
    drawing.validation.prompts.add(name="noise", prompt="a picture of noise")
    job_id = reverie.jobs.submit(drawing).job_id
    wait_for(job_id, is_step(1))
    stack.kill("sampler")
    wait_for(job_id, lambda event: event.notice.reason == "SAMPLER_UNAVAILABLE")
    stack.restart("sampler")
    job = reverie.jobs.result(job_id)
    assert job.adapter.sha256 == undisturbed.adapter.sha256
    drawn = {artifact.path for artifact in reverie.jobs.artifacts(job_id)}
    assert {f"validation/step_{step}_noise_0_128x128.png" for step in (0, 6, 12)} <= drawn
