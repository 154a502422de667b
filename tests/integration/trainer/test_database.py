"""The migrations, on a real database file."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from reverie_trainer.jobs.state.changes import Changes, wait_for
from reverie_trainer.jobs.state.database import Database, mark_changed, migrate, sqlite_url
from reverie_trainer.jobs.state.models import Base, DatasetRow
from sqlalchemy.orm import Session


def test_migrated_tables_are_those_of_the_models(tmp_path: Path) -> None:
    engine = sqlalchemy.create_engine(sqlite_url(tmp_path))
    migrate(engine)
    migrate(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


@pytest.fixture
async def database(tmp_path: Path) -> Any:
    opened = Database(sqlite_url(tmp_path), Changes())
    await opened.open()
    yield opened
    await opened.close()


def add_row(session: Session, name: str = "cats") -> None:
    session.add(DatasetRow(name=name, version="v", num_samples=0, size_bytes=0))
    mark_changed(session, name)


async def test_failed_transaction_leaves_nothing_and_wakes_nobody(database: Database) -> None:
    signal = database.changes.signal("cats")

    def fail(session: Session) -> None:
        add_row(session)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await database.run(fail)
    assert await database.run(lambda session: session.get(DatasetRow, "cats")) is None
    assert not signal.is_set()


async def test_commit_wakes_who_waits_for_it(database: Database) -> None:
    waiting, other = database.changes.signal("cats"), database.changes.signal("dogs")
    await asyncio.gather(wait_for(waiting, 5), database.run(add_row))
    assert waiting.is_set()
    assert not other.is_set()


async def test_cancelled_caller_still_wakes_who_waits(database: Database) -> None:
    waiting = database.changes.signal("cats")
    begun, may_end = threading.Event(), threading.Event()

    def work(session: Session) -> None:
        begun.set()
        may_end.wait(10)
        add_row(session)

    task = asyncio.create_task(database.run(work))
    await asyncio.to_thread(begun.wait, 10)
    task.cancel()
    may_end.set()
    assert await wait_for(waiting, 5)
