"""A job's life as transactions: accepted, moved from state to state, cancelled, resumed, listed.

Every function takes the session of the transaction that it is part of.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reverie.common.v1 import common_pb2
from reverie.training.v1 import job_pb2
from reverie_common.errors import FailedPreconditionError
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from reverie_trainer.jobs.state.events import append, append_notice, now, unknown_job
from reverie_trainer.jobs.state.models import ArtifactRow, CheckpointRow, EventRow, JobRow
from reverie_trainer.jobs.state.records import (
    ACTIVE_STATES,
    CANCELLED,
    FAILED,
    PREPARING,
    QUEUED,
    SUCCEEDED,
    TRAINING,
    add_phase,
    find_job,
    is_at_rest,
    new_job_id,
    read_record,
    read_spec,
    seconds_since,
    state_name,
    write_record,
)

INFO = job_pb2.NOTICE_SEVERITY_INFO
WARNING = job_pb2.NOTICE_SEVERITY_WARNING


@dataclass(frozen=True, kw_only=True, slots=True)
class ActiveJob:
    """What the reconciler needs to know of a job that is not at rest."""

    job_id: str
    state: int
    cancel_time: float | None
    """Unix time at which it was cancelled."""
    worker_process: Mapping[str, str] | None
    """How the launcher finds the worker that was started last; None when there is none to look for."""
    launch_time: float | None
    """Unix time at which that worker was started."""
    has_lease: bool
    starts_without_progress: int


def create_job(
    session: Session, spec: job_pb2.TrainingJobSpec, dataset_versions: Mapping[str, str], job_id: str | None = None
) -> JobRow:
    """Accept a job, under an id that was chosen before or under a new one."""
    record = job_pb2.TrainingJob(create_time=now())
    row = JobRow(
        job_id=job_id or new_job_id(),
        state=QUEUED,
        spec=spec.SerializeToString(deterministic=True),
        record=record.SerializeToString(),
        dataset_versions=dict(dataset_versions),
        last_sequence=0,
        report_sequence=0,
        starts_without_progress=0,
        furthest_step=0,
    )
    session.add(row)
    session.flush()
    append(session, row, state_changed=job_pb2.StateChanged(to_state=QUEUED))
    return row


def get_job(session: Session, job_id: str) -> JobRow:
    """Return a job's row.

    Raises:
        NotFoundError: there is no such job.
    """
    row = find_job(session, job_id)
    if row is None:
        raise unknown_job(job_id)
    return row


def list_jobs(session: Session, states: Sequence[int], before_id: int | None, limit: int) -> list[JobRow]:
    """Return jobs in any of the given states (none given means all), newest first, from before a position."""
    query = select(JobRow).order_by(JobRow.id.desc()).limit(limit)
    if states:
        query = query.where(JobRow.state.in_(states))
    if before_id is not None:
        query = query.where(JobRow.id < before_id)
    return list(session.scalars(query))


def active_jobs(session: Session) -> list[ActiveJob]:
    """Return the jobs that are not at rest, in the order of acceptance."""
    rows = session.scalars(select(JobRow).where(JobRow.state.in_(ACTIVE_STATES)).order_by(JobRow.id))
    return [
        ActiveJob(
            job_id=row.job_id,
            state=row.state,
            cancel_time=row.cancel_time,
            worker_process=row.worker_process,
            launch_time=row.launch_time,
            has_lease=row.lease_id is not None,
            starts_without_progress=row.starts_without_progress,
        )
        for row in rows
    ]


def lingering_workers(session: Session) -> dict[str, Mapping[str, str]]:
    """Return the workers, by job, of jobs that came to rest while their worker's process may still run."""
    rows = session.scalars(select(JobRow).where(JobRow.worker_process.is_not(None), JobRow.state.not_in(ACTIVE_STATES)))
    return {row.job_id: row.worker_process for row in rows if row.worker_process is not None}


def transition(session: Session, row: JobRow, to_state: int, message: str = "") -> None:
    """Move a job to a state, with the times and the event that belong to it; a job at rest loses its lease."""
    from_state = row.state
    record = read_record(row)
    row.state = to_state
    record.state = job_pb2.TrainingJobState.ValueType(to_state)
    if to_state == PREPARING and not record.HasField("start_time"):
        record.start_time.CopyFrom(now())
    if is_at_rest(to_state):
        record.end_time.CopyFrom(now())
        row.lease_id = None
        row.token_digest = None
    write_record(row, record)
    change = job_pb2.StateChanged(
        from_state=job_pb2.TrainingJobState.ValueType(from_state),
        to_state=job_pb2.TrainingJobState.ValueType(to_state),
        message=message,
    )
    append(session, row, state_changed=change)


def begin_preparation(session: Session, job_id: str) -> bool:
    """Move a queued job to PREPARING; False when it is in another state by now."""
    row = get_job(session, job_id)
    if row.state != QUEUED:
        return False
    transition(session, row, PREPARING)
    return True


def finish_preparation(
    session: Session,
    job_id: str,
    prepared: common_pb2.ObjectRef,
    report: job_pb2.PreparationReport,
    seconds: float,
    max_steps: int,
) -> bool:
    """Keep what preparation made and move the job to TRAINING; False when it is no longer PREPARING.

    `max_steps` is filled into the spec: a job of num_epochs has none before its buckets are known.
    """
    row = get_job(session, job_id)
    if row.state != PREPARING:
        return False
    row.prepared = prepared.SerializeToString()
    row.preparation = report.SerializeToString()
    spec = read_spec(row)
    spec.optimization.max_steps = max_steps
    row.spec = spec.SerializeToString(deterministic=True)
    record = read_record(row)
    add_phase(record, "prepare", seconds)
    write_record(row, record)
    transition(session, row, TRAINING)
    return True


def fail_job(session: Session, job_id: str, failure: job_pb2.JobFailure) -> bool:
    """Move a job to FAILED with its reason; False when it is at rest already."""
    row = get_job(session, job_id)
    if is_at_rest(row.state):
        return False
    record = read_record(row)
    record.failure.CopyFrom(failure)
    write_record(row, record)
    transition(session, row, FAILED, failure.message)
    return True


def request_cancellation(session: Session, job_id: str) -> JobRow:
    """Note that a job shall stop. Without a worker it is CANCELLED at once, otherwise when the worker has stopped.

    Raises:
        FailedPreconditionError: the job is at rest.
    """
    row = get_job(session, job_id)
    if is_at_rest(row.state):
        raise _wrong_state(row, "cancelled; only a job at work can be")
    if row.cancel_time is None:
        row.cancel_time = time.time()
        if row.worker_process is None and row.lease_id is None:
            transition(session, row, CANCELLED, "cancelled by request")
        else:
            append_notice(session, row, INFO, "CANCEL_REQUESTED", "the worker is told to save and stop")
    return row


def finish_cancellation(session: Session, job_id: str, message: str) -> bool:
    """Move a job whose worker is gone to CANCELLED; False when it is at rest already."""
    row = get_job(session, job_id)
    row.worker_process = None
    if is_at_rest(row.state):
        return False
    transition(session, row, CANCELLED, message)
    return True


def require_resumable(row: JobRow) -> None:
    """Refuse a job that cannot be resumed.

    Raises:
        FailedPreconditionError: the job is neither FAILED nor CANCELLED.
    """
    if row.state not in (FAILED, CANCELLED):
        raise _wrong_state(row, "resumed; only a FAILED or CANCELLED job can be")


def resume_job(session: Session, job_id: str, step: int = 0) -> JobRow:
    """Queue a FAILED or CANCELLED job again; it goes on from a step, or from its newest checkpoint for 0.

    Raises:
        FailedPreconditionError: the job is in another state.
    """
    row = get_job(session, job_id)
    require_resumable(row)
    record = read_record(row)
    if step:
        session.execute(delete(CheckpointRow).where(CheckpointRow.job_id == job_id, CheckpointRow.step > step))
        record.step = row.furthest_step = step
    record.ClearField("failure")
    record.ClearField("end_time")
    write_record(row, record)
    row.cancel_time = None
    row.starts_without_progress = 0
    transition(session, row, QUEUED, "resumed by request")
    return row


def request_validation(session: Session, job_id: str) -> JobRow:
    """Note that pictures are wanted now; the worker learns it with its next report.

    Raises:
        FailedPreconditionError: the job is not in TRAINING, or has no validation.
    """
    row = get_job(session, job_id)
    if row.state != TRAINING:
        raise _wrong_state(row, "asked for pictures; only a job in TRAINING can be")
    if not read_spec(row).HasField("validation"):
        raise FailedPreconditionError(
            f"job {job_id} has no validation, so there is nothing to draw; use `reverie sample` with the adapter of "
            "one of its checkpoints",
            reason="NO_VALIDATION",
            metadata={"job_id": job_id},
        )
    record = read_record(row)
    record.num_validation_requests += 1
    write_record(row, record)
    append_notice(session, row, INFO, "VALIDATION_REQUESTED", "pictures are drawn after the current step")
    return row


def list_checkpoints(session: Session, job_id: str, before_step: int | None, limit: int) -> list[job_pb2.Checkpoint]:
    """Return a job's checkpoints, newest first, from before a step."""
    get_job(session, job_id)
    query = select(CheckpointRow).where(CheckpointRow.job_id == job_id).order_by(CheckpointRow.step.desc()).limit(limit)
    if before_step is not None:
        query = query.where(CheckpointRow.step < before_step)
    return [job_pb2.Checkpoint.FromString(row.body) for row in session.scalars(query)]


def list_artifacts(
    session: Session, job_id: str, after_path: str | None, limit: int
) -> list[tuple[str, common_pb2.ObjectRef]]:
    """Return (path, object) of what a job made, by path, from after a path."""
    get_job(session, job_id)
    query = select(ArtifactRow).where(ArtifactRow.job_id == job_id).order_by(ArtifactRow.path).limit(limit)
    if after_path is not None:
        query = query.where(ArtifactRow.path > after_path)
    return [(row.path, common_pb2.ObjectRef.FromString(row.body)) for row in session.scalars(query)]


def put_artifact(session: Session, job_id: str, path: str, reference: common_pb2.ObjectRef) -> None:
    """Keep a file that a job made; a newer one of the same path takes its place."""
    session.merge(ArtifactRow(job_id=job_id, path=path, body=reference.SerializeToString()))


def count_events(session: Session, job_id: str, kind: str) -> int:
    """Return how many events of a kind a job has."""
    query = select(EventRow.sequence).where(EventRow.job_id == job_id, EventRow.kind == kind)
    return len(session.scalars(query).all())


def seconds_in_preparation(row: JobRow) -> float:
    """Return the seconds since a job's preparation began."""
    record = read_record(row)
    return seconds_since(record.start_time, now()) if record.HasField("start_time") else 0.0


def succeed(session: Session, row: JobRow, adapter: common_pb2.ObjectRef) -> None:
    """Move a job to SUCCEEDED with its exported adapter."""
    record = read_record(row)
    record.adapter.CopyFrom(adapter)
    write_record(row, record)
    transition(session, row, SUCCEEDED)


def _wrong_state(row: JobRow, what: str) -> FailedPreconditionError:
    name = state_name(row.state)
    return FailedPreconditionError(
        f"job {row.job_id} is {name} and cannot be {what}",
        reason="WRONG_JOB_STATE",
        metadata={"job_id": row.job_id, "state": name},
    )
