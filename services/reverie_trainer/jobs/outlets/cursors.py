"""How far each outlet has been told a job's history, as transactions."""

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from reverie_trainer.jobs.state.models import OutletRow


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """An outlet of a job, and the last event that it was told."""

    job_id: str
    name: str
    sequence: int


def open_cursors(session: Session, job_id: str, names: Iterable[str]) -> None:
    """Note the outlets of a new job."""
    for name in names:
        session.add(OutletRow(job_id=job_id, name=name, sequence=0, is_done=False))


def unfinished_cursors(session: Session) -> list[Cursor]:
    """Return every outlet that has not been told everything."""
    rows = session.scalars(select(OutletRow).where(OutletRow.is_done.is_(False)))
    return [Cursor(job_id=row.job_id, name=row.name, sequence=row.sequence) for row in rows]


def advance_cursor(session: Session, cursor: Cursor, *, is_done: bool) -> None:
    """Note that an outlet was told everything up to an event, or all there is of a job that rests."""
    row = session.get_one(OutletRow, (cursor.job_id, cursor.name))
    row.sequence = cursor.sequence
    row.is_done = is_done


def reopen_cursors(session: Session, job_id: str) -> None:
    """Note that there will be more to tell: the job was resumed."""
    session.execute(update(OutletRow).where(OutletRow.job_id == job_id).values(is_done=False))
