"""Jobs that begin with what other jobs have learnt, through all services."""

import struct
import tempfile
from pathlib import Path

import pytest
from reverie.training.v1.job_pb2 import TrainingJob, TrainingJobSpec
from reverie_client import SyncReverie
from reverie_client.specs import load_job_spec

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
STEPS = 8


def spec_of(dataset: str, steps: int) -> TrainingJobSpec:
    """A job without pictures, whose name and rate do not depend on its length."""
    spec = load_job_spec(QUICKSTART / "job.yaml")
    spec.name = "forked"
    spec.datasets[0].dataset = dataset
    spec.datasets[0].resolution = 128
    spec.optimization.max_steps = steps
    spec.optimization.lr_warmup_steps = 2
    spec.checkpoints.every_steps = steps
    spec.ClearField("validation")
    return spec


@pytest.fixture(scope="module")
def whole(reverie: SyncReverie, quickstart_dataset: str) -> TrainingJob:
    return reverie.jobs.result(reverie.jobs.submit(spec_of(quickstart_dataset, STEPS)).job_id)


@pytest.fixture(scope="module")
def half(reverie: SyncReverie, quickstart_dataset: str) -> TrainingJob:
    return reverie.jobs.result(reverie.jobs.submit(spec_of(quickstart_dataset, STEPS // 2)).job_id)


def steps_of(reverie: SyncReverie, job_id: str) -> list[int]:
    return [event.step.step for event in reverie.jobs.watch(job_id) if event.HasField("step")]


def test_fork_of_half_a_job_ends_in_the_very_adapter_of_the_whole_one(
    reverie: SyncReverie, quickstart_dataset: str, whole: TrainingJob, half: TrainingJob
) -> None:
    fork = reverie.jobs.fork(half.job_id, spec=spec_of(quickstart_dataset, STEPS))
    done = reverie.jobs.result(fork.job_id)
    assert done.adapter.sha256 == whole.adapter.sha256 != half.adapter.sha256
    assert steps_of(reverie, fork.job_id) == list(range(STEPS // 2 + 1, STEPS + 1))


def test_adapter_alone_begins_at_step_1_where_the_other_ended(
    reverie: SyncReverie, quickstart_dataset: str, whole: TrainingJob, half: TrainingJob
) -> None:
    spec = spec_of(quickstart_dataset, 1)
    spec.optimization.learning_rate = 1e-30
    spec.optimization.weight_decay = 0.0
    fork = reverie.jobs.fork(half.job_id, spec=spec, adapter_only=True)
    done = reverie.jobs.result(fork.job_id)
    assert steps_of(reverie, fork.job_id) == [1]
    assert done.adapter.sha256 != whole.adapter.sha256
    assert tensors(reverie, done.job_id) == tensors(reverie, half.job_id)


def tensors(reverie: SyncReverie, job_id: str) -> bytes:
    """The bytes of all tensors of a job's adapter, without the header, which tells the number of steps."""
    with tempfile.TemporaryDirectory() as folder:
        reverie.jobs.fetch(job_id, Path(folder))
        body = (Path(folder) / "adapter/pytorch_lora_weights.safetensors").read_bytes()
    (header_size,) = struct.unpack("<Q", body[:8])
    return body[8 + header_size :]
