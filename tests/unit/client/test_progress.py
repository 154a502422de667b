"""A job's events as lines, where bars cannot be drawn."""

import io

import pytest
from reverie.training.v1.job_pb2 import (
    Checkpoint,
    JobNotice,
    PreparationProgress,
    StateChanged,
    StepMetrics,
    TrainingJob,
    TrainingJobEvent,
    TrainingJobState,
    ValidationProgress,
)
from reverie.training.v1.measures_pb2 import EvaluationResult
from reverie_client.cli.progress import JobView
from rich.console import Console


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def view(out: io.StringIO) -> JobView:
    view = JobView(Console(file=out, width=200))
    job = TrainingJob(job_id="job-1")
    job.spec.optimization.max_steps = 100
    view.show(TrainingJobEvent(snapshot=job))
    return view


def step(number: int) -> TrainingJobEvent:
    metrics = StepMetrics(step=number, loss=0.5, learning_rate=1e-4, step_seconds=0.25)
    return TrainingJobEvent(step=metrics)


def test_says_each_tenth_of_the_steps_with_loss_and_speed(view: JobView, out: io.StringIO) -> None:
    for number in range(1, 101):
        view.show(step(number))
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[-1] == "step 100 of 100  loss 0.5000  lr 1.0e-04  0.25 s/step"


def test_says_nothing_twice_after_a_reconnection(view: JobView, out: io.StringIO) -> None:
    for event in (step(10), TrainingJobEvent(checkpoint=Checkpoint(step=10))) * 2:
        view.show(event)
    assert len(out.getvalue().splitlines()) == 2


def test_says_what_preparation_found_in_the_store(view: JobView, out: io.StringIO) -> None:
    progress = PreparationProgress(stage="encode_prompts", num_done=4, num_total=4, num_cached=3)
    view.show(TrainingJobEvent(preparation=progress))
    assert out.getvalue() == "encode captions: 4 done (3 found in the store)\n"


def test_says_each_evaluation_loss_once(view: JobView, out: io.StringIO) -> None:
    for weights in ("adapter", "ema", "ema"):
        result = EvaluationResult(step=5, dataset="held-out", loss=0.123456, weights=weights)
        view.show(TrainingJobEvent(evaluation=result))
    assert out.getvalue().splitlines() == [
        "evaluation loss @ 5: 0.12346 on held-out",
        "evaluation loss EMA @ 5: 0.12346 on held-out",
    ]


def test_says_states_pictures_and_notices(view: JobView, out: io.StringIO) -> None:
    training = TrainingJobState.TRAINING_JOB_STATE_TRAINING
    view.show(TrainingJobEvent(state_changed=StateChanged(to_state=training, message="worker 2")))
    view.show(TrainingJobEvent(validation_progress=ValidationProgress(step=0, num_done=2, num_total=2)))
    view.show(TrainingJobEvent(notice=JobNotice(message="the sampler [is] away")))
    assert out.getvalue().splitlines() == ["training worker 2", "pictures of base: 2 done", "the sampler [is] away"]
