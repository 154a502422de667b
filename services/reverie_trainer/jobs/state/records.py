"""Rows of jobs and their messages."""

import secrets
from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp
from reverie.training.v1 import job_pb2
from sqlalchemy import select
from sqlalchemy.orm import Session

from reverie_trainer.jobs.state.models import JobRow

QUEUED = job_pb2.TRAINING_JOB_STATE_QUEUED
PREPARING = job_pb2.TRAINING_JOB_STATE_PREPARING
TRAINING = job_pb2.TRAINING_JOB_STATE_TRAINING
SUCCEEDED = job_pb2.TRAINING_JOB_STATE_SUCCEEDED
FAILED = job_pb2.TRAINING_JOB_STATE_FAILED
CANCELLED = job_pb2.TRAINING_JOB_STATE_CANCELLED

ACTIVE_STATES: Sequence[int] = (QUEUED, PREPARING, TRAINING)


def new_job_id() -> str:
    """Return a fresh job id."""
    return f"job-{secrets.token_hex(6)}"


def is_at_rest(state: int) -> bool:
    """Whether nothing will happen to a job in this state by itself."""
    return state not in ACTIVE_STATES


def state_name(state: int) -> str:
    """Return a state as people read it, for instance `TRAINING`."""
    return job_pb2.TrainingJobState.Name(job_pb2.TrainingJobState.ValueType(state)).removeprefix("TRAINING_JOB_STATE_")


def find_job(session: Session, job_id: str) -> JobRow | None:
    """Return a job's row, None for an unknown id."""
    return session.scalars(select(JobRow).where(JobRow.job_id == job_id)).one_or_none()


def job_message(row: JobRow) -> job_pb2.TrainingJob:
    """Return a job as the contract shows it."""
    job = read_record(row)
    job.spec.CopyFrom(read_spec(row))
    if row.preparation is not None:
        job.preparation.ParseFromString(row.preparation)
    job.last_sequence = row.last_sequence
    return job


def read_spec(row: JobRow) -> job_pb2.TrainingJobSpec:
    """Return what a job asks for."""
    return job_pb2.TrainingJobSpec.FromString(row.spec)


def read_record(row: JobRow) -> job_pb2.TrainingJob:
    """Return the changing part of a job: without spec and preparation."""
    record = job_pb2.TrainingJob.FromString(row.record)
    record.job_id = row.job_id
    record.state = job_pb2.TrainingJobState.ValueType(row.state)
    return record


def write_record(row: JobRow, record: job_pb2.TrainingJob) -> None:
    """Keep the changing part of a job."""
    row.record = record.SerializeToString()


def add_phase(record: job_pb2.TrainingJob, name: str, seconds: float) -> None:
    """Add seconds to a phase of a job."""
    for phase in record.phases:
        if phase.name == name:
            phase.seconds += seconds
            return
    record.phases.add(name=name, seconds=seconds)


def seconds_since(start: Timestamp, end: Timestamp) -> float:
    """Return the seconds between two times."""
    return (end.ToNanoseconds() - start.ToNanoseconds()) / 1e9
