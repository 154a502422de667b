"""The SDK against a trainer process and a real store."""

import threading
import uuid
from pathlib import Path
from typing import Protocol

import pytest
from reverie.training.v1.job_pb2 import TrainingJobEvent, TrainingJobSpec, TrainingJobState
from reverie_client import CallPolicy, JobFailedError, Progress, SyncReverie
from reverie_client.specs import load_job_spec, parse_job_spec
from reverie_common.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from reverie_common.storage.seaweed import Seaweed

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"


class Trainer(Protocol):
    """What conftest's TrainerProcess offers."""

    address: str

    def start(self) -> None:
        """Start it."""

    def kill(self) -> None:
        """Kill it."""


@pytest.fixture
def name() -> str:
    return f"cats-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def spec(reverie: SyncReverie, name: str) -> TrainingJobSpec:
    reverie.datasets.create(name)
    reverie.datasets.upload_folder(name, QUICKSTART / "photos")
    spec = load_job_spec(QUICKSTART / "job.yaml")
    spec.datasets[0].dataset = name
    return spec


def test_a_folder_becomes_a_dataset_and_is_sent_once(reverie: SyncReverie, name: str, seaweed: Seaweed) -> None:
    reverie.datasets.create(name)
    first = reverie.datasets.upload_folder(name, QUICKSTART / "photos")
    assert (first.num_added, first.num_replaced) == (14, 0)
    assert first.dataset.num_samples == 14

    seen: list[Progress] = []
    again = reverie.datasets.upload_folder(name, QUICKSTART / "photos", on_progress=seen.append)
    assert (again.num_added, again.num_replaced) == (0, 14)
    assert again.dataset.version == first.dataset.version
    assert {progress.num_total for progress in seen} == {0}
    assert name in [dataset.name for dataset in reverie.datasets.list()]

    reverie.datasets.delete(name)
    with pytest.raises(NotFoundError):
        reverie.datasets.get(name)


def test_a_name_that_is_taken_is_refused(reverie: SyncReverie, name: str) -> None:
    request_id = str(uuid.uuid4())
    assert reverie.datasets.create(name, request_id=request_id) == reverie.datasets.create(name, request_id=request_id)
    with pytest.raises(AlreadyExistsError):
        reverie.datasets.create(name)


def test_upload_to_an_unknown_dataset_sends_nothing(reverie: SyncReverie) -> None:
    with pytest.raises(NotFoundError):
        reverie.datasets.upload_folder("no-such-dataset", QUICKSTART / "photos")


def test_every_wrong_field_of_a_job_is_reported_at_once(reverie: SyncReverie) -> None:
    wrong = parse_job_spec(
        """
        name: Not A Name
        datasets: [{dataset: no-such-dataset, resolution: 0}]
        adapter: {lokr: {}}
        optimization: {max_steps: 0, learning_rate: .nan, optimizer: sgd}
        """
    )
    with pytest.raises(InvalidArgumentError) as caught:
        reverie.jobs.submit(wrong)
    fields = {violation.field for violation in caught.value.violations}
    assert {"optimization.max_steps", "optimization.learning_rate", "optimization.optimizer"} <= fields


def test_a_job_is_submitted_once_cancelled_and_tells_that(reverie: SyncReverie, spec: TrainingJobSpec) -> None:
    request_id = str(uuid.uuid4())
    job = reverie.jobs.submit(spec, request_id=request_id)
    assert reverie.jobs.submit(spec, request_id=request_id).job_id == job.job_id
    assert reverie.jobs.get(job.job_id).spec == job.spec
    assert [found.job_id for found in reverie.jobs.list(limit=1)] == [job.job_id]

    reverie.jobs.cancel(job.job_id)
    with pytest.raises(JobFailedError) as caught:
        reverie.jobs.result(job.job_id)
    assert caught.value.reason == "JOB_CANCELLED"
    assert f"reverie job resume {job.job_id}" in caught.value.remedy
    with pytest.raises(FailedPreconditionError):
        reverie.jobs.cancel(job.job_id)

    assert reverie.jobs.resume(job.job_id).state != TrainingJobState.TRAINING_JOB_STATE_CANCELLED
    reverie.jobs.cancel(job.job_id)
    reverie.jobs.wait(job.job_id)


def test_an_unknown_job_is_not_found(reverie: SyncReverie) -> None:
    with pytest.raises(NotFoundError):
        reverie.jobs.get("job-000000000000")
    with pytest.raises(NotFoundError):
        next(iter(reverie.jobs.watch("job-000000000000")))


def test_a_watch_survives_the_death_of_the_trainer_and_repeats_nothing(
    trainer: Trainer, reverie: SyncReverie, spec: TrainingJobSpec
) -> None:
    job = reverie.jobs.submit(spec)
    events: list[TrainingJobEvent] = []
    began = threading.Event()

    def note(event: TrainingJobEvent) -> None:
        events.append(event)
        began.set()

    watching = threading.Thread(target=lambda: reverie.jobs.wait(job.job_id, on_event=note))
    watching.start()
    assert began.wait(30)
    trainer.kill()
    trainer.start()
    reverie.jobs.cancel(job.job_id)
    watching.join(60)
    assert not watching.is_alive()

    sequences = [event.sequence for event in events if not event.HasField("snapshot")]
    assert sequences == list(range(1, len(sequences) + 1))
    assert events[-1].snapshot.state == TrainingJobState.TRAINING_JOB_STATE_CANCELLED


def test_a_call_waits_for_a_trainer_that_starts_again(trainer: Trainer, reverie: SyncReverie) -> None:
    trainer.kill()
    restarting = threading.Thread(target=trainer.start)
    restarting.start()
    reverie.datasets.list()
    restarting.join()


def test_a_trainer_that_is_not_there_is_unavailable() -> None:
    with (
        SyncReverie("127.0.0.1:9", policy=CallPolicy(retry_seconds=0.0)) as reverie,
        pytest.raises(UnavailableError),
    ):
        reverie.jobs.list()


def test_a_group_without_an_address_says_how_to_give_it(reverie: SyncReverie) -> None:
    with pytest.raises(FailedPreconditionError, match="encoder='host:port'"):
        reverie.encoders.describe()
