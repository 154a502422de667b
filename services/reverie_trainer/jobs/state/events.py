"""A job's history: events numbered without gaps, and following them live."""

from collections.abc import AsyncIterator
from typing import Any, TypeAlias

from google.protobuf.timestamp_pb2 import Timestamp
from reverie.training.v1 import job_pb2
from reverie_common.errors import NotFoundError, UnavailableError
from sqlalchemy import select
from sqlalchemy.orm import Session

from reverie_trainer.jobs.state.changes import wait_for
from reverie_trainer.jobs.state.database import Database, mark_changed
from reverie_trainer.jobs.state.models import EventRow, JobRow
from reverie_trainer.jobs.state.records import find_job, is_at_rest, job_message

Severity: TypeAlias = job_pb2.NoticeSeverity.ValueType

_PAGE = 500

# News wake a watch at once; this only bounds how long a client that is gone goes unnoticed.
_IDLE_SECONDS = 30.0


def append_event(session: Session, row: JobRow, event: job_pb2.TrainingJobEvent) -> None:
    """Add an event to a job's history with the next number, and with the present time where it has none."""
    row.last_sequence += 1
    event.sequence = row.last_sequence
    if not event.HasField("time"):
        event.time.CopyFrom(now())
    kind = event.WhichOneof("payload") or ""
    session.add(EventRow(job_id=row.job_id, sequence=row.last_sequence, kind=kind, body=event.SerializeToString()))
    mark_changed(session, row.job_id)


def append(session: Session, row: JobRow, **payload: Any) -> None:
    """Add an event with one payload, named like its field in TrainingJobEvent."""
    append_event(session, row, job_pb2.TrainingJobEvent(**payload))


def append_notice(session: Session, row: JobRow, severity: Severity, reason: str, message: str) -> None:
    """Add something that a person should know."""
    append(session, row, notice=job_pb2.JobNotice(severity=severity, reason=reason, message=message))


def read_events(session: Session, job_id: str, after_sequence: int) -> list[job_pb2.TrainingJobEvent]:
    """Return the next events after a number, oldest first."""
    rows = session.scalars(
        select(EventRow)
        .where(EventRow.job_id == job_id, EventRow.sequence > after_sequence)
        .order_by(EventRow.sequence)
        .limit(_PAGE)
    )
    return [job_pb2.TrainingJobEvent.FromString(row.body) for row in rows]


async def watch(database: Database, job_id: str, after_sequence: int) -> AsyncIterator[job_pb2.TrainingJobEvent]:
    """Yield a snapshot, every event after a number, new ones as they come, and a snapshot once the job rests."""
    yield await database.run(lambda session: _snapshot(session, job_id)[0])
    cursor = after_sequence
    while True:
        signal = database.changes.signal(job_id)
        events, end = await database.run(lambda session, after=cursor: _read_on(session, job_id, after))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        for event in events:
            yield event
            cursor = event.sequence
        if end is not None:
            yield end
            return
        if database.changes.is_closed:
            raise _stopping()
        if not events:
            await wait_for(signal, _IDLE_SECONDS)


def _read_on(
    session: Session, job_id: str, after_sequence: int
) -> tuple[list[job_pb2.TrainingJobEvent], job_pb2.TrainingJobEvent | None]:
    events = read_events(session, job_id, after_sequence)
    snapshot, rests = _snapshot(session, job_id)
    newest = events[-1].sequence if events else after_sequence
    return events, snapshot if rests and newest >= snapshot.sequence else None


def _snapshot(session: Session, job_id: str) -> tuple[job_pb2.TrainingJobEvent, bool]:
    row = find_job(session, job_id)
    if row is None:
        raise unknown_job(job_id)
    event = job_pb2.TrainingJobEvent(sequence=row.last_sequence, time=now(), snapshot=job_message(row))
    return event, is_at_rest(row.state)


def unknown_job(job_id: str) -> NotFoundError:
    """Return the error for a job that does not exist."""
    return NotFoundError(
        f"there is no job {job_id[:80]!r}; ListTrainingJobs (`reverie job list`) shows all",
        reason="JOB_NOT_FOUND",
        metadata={"job_id": job_id[:80]},
    )


def _stopping() -> UnavailableError:
    return UnavailableError(
        "the trainer stops; watch again after the last sequence number when it is back",
        reason="STOPPING",
        retry_after_seconds=2.0,
    )


def now() -> Timestamp:
    """Return the present time."""
    timestamp = Timestamp()
    timestamp.GetCurrentTime()
    return timestamp
