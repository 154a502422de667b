"""The database: one thread that carries out transactions, and the announcement of what they changed.

One writer is what SQLite wants (more of them starve each other for seconds), and one thread serves PostgreSQL well
enough for what one trainer writes.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import alembic.command
import alembic.config
import sqlalchemy
from sqlalchemy import event
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry, StaticPool

from reverie_trainer.jobs.state.changes import Changes

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_CHANGED_JOBS = "changed_jobs"


class Database:
    """Carries out transactions one after another, off the event loop.

    Every transaction that calls `mark_changed` wakes those who wait for the job in `changes`, after the commit.
    """

    def __init__(self, url: str, changes: Changes) -> None:
        self.changes = changes
        self._engine = _create_engine(url)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")

    async def open(self) -> None:
        """Bring the tables to the newest revision; an empty database is filled, an older one migrated."""
        await self._in_thread(lambda: migrate(self._engine))

    async def run(self, work: Callable[[Session], Result]) -> Result:
        """Run `work` in one transaction; it is rolled back when `work` raises. `work` must not keep the session."""
        loop = asyncio.get_running_loop()
        return await self._in_thread(lambda: self._transact(work, loop))

    async def close(self) -> None:
        """Finish what was begun and close every connection."""
        await self._in_thread(self._engine.dispose)
        self._thread.shutdown()

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _transact(self, work: Callable[[Session], Result], loop: asyncio.AbstractEventLoop) -> Result:
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            result = work(session)
        changed: set[str] = session.info.get(_CHANGED_JOBS, set())
        for job_id in changed:
            # From this thread and not from the coroutine, which may have been cancelled meanwhile.
            loop.call_soon_threadsafe(self.changes.announce, job_id)
        return result


def mark_changed(session: Session, job_id: str) -> None:
    """Announce, after the commit, that a job has news."""
    session.info.setdefault(_CHANGED_JOBS, set()).add(job_id)


def migrate(engine: Engine) -> None:
    """Apply every migration that the database lacks."""
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "head")
        connection.commit()


def sqlite_url(directory: Path) -> str:
    """URL of the SQLite database in a state directory, which is created."""
    directory.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{directory / 'trainer.db'}"


def _create_engine(url: str) -> Engine:
    is_sqlite = make_url(url).get_backend_name() == "sqlite"
    # The one thread keeps its one SQLite connection; a pool would open the file again and again.
    options: dict[str, Any] = (
        {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}} if is_sqlite else {}
    )
    engine = sqlalchemy.create_engine(url, **options)
    if is_sqlite:
        event.listen(engine, "connect", _configure_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    # WAL with NORMAL survives a killed process; only a power cut may lose the newest transactions.
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA busy_timeout=30000")
    cursor.close()
