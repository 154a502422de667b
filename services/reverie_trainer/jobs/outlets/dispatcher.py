"""Follows the history of every job that has outlets, one task for each outlet."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from reverie.training.v1 import job_pb2
from reverie_common.errors import UnavailableError
from sqlalchemy.orm import Session

from reverie_trainer.jobs.outlets.cursors import Cursor, advance_cursor, unfinished_cursors
from reverie_trainer.jobs.outlets.outlet import NOTICE_PREFIX, Outlet, OutletFailedError
from reverie_trainer.jobs.state.changes import wait_for
from reverie_trainer.jobs.state.database import Database
from reverie_trainer.jobs.state.events import append_notice, watch
from reverie_trainer.jobs.state.records import job_message
from reverie_trainer.jobs.state.repository import WARNING, get_job

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 5.0
_STOP_SECONDS = 5.0

# After so many untold events that left no trace elsewhere the place is noted; a restart repeats at most so many.
_NOTED_EVERY = 50

MakeOutlet = Callable[[job_pb2.TrainingJob, str], Outlet]
"""Makes the outlet of a name for a job."""


class Dispatcher:
    """Tells outlets what happens, and goes on after a restart where it was."""

    def __init__(self, database: Database, make_outlet: MakeOutlet) -> None:
        self._database = database
        self._make_outlet = make_outlet
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow jobs."""
        self._loop = asyncio.create_task(self._run(), name="outlets")

    async def stop(self) -> None:
        """Stop telling; what is not told yet is told by the next trainer."""
        if self._loop is not None:
            self._loop.cancel()
        tasks = [*self._tasks.values(), *([self._loop] if self._loop is not None else [])]
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            signal = self._database.changes.any_signal()
            try:
                for cursor in await self._database.run(unfinished_cursors):
                    self._ensure_task(cursor)
            except Exception:
                # The boundary: one error of the database must not end the telling of all jobs.
                logger.exception("looking for jobs with outlets failed; trying again")
            await wait_for(signal, _LOOK_SECONDS)

    def _ensure_task(self, cursor: Cursor) -> None:
        key = (cursor.job_id, cursor.name)
        if key in self._tasks:
            return
        task = asyncio.create_task(self._follow(cursor), name=f"{cursor.name} of {cursor.job_id}")
        self._tasks[key] = task
        task.add_done_callback(lambda _: self._tasks.pop(key, None))

    async def _follow(self, cursor: Cursor) -> None:
        try:
            job = await self._job(cursor.job_id)
            outlet = self._make_outlet(job, cursor.name)
            try:
                await self._tell_all(outlet, cursor, job)
            finally:
                await outlet.close()
        except UnavailableError:
            logger.debug("the trainer stops; %s of %s goes on with the next one", cursor.name, cursor.job_id)
        except Exception:
            # The boundary: a bug in one outlet must not reach jobs or other outlets.
            logger.exception("an outlet failed", extra={"job_id": cursor.job_id, "outlet": cursor.name})
            await self._give_up(cursor)

    async def _tell_all(self, outlet: Outlet, cursor: Cursor, job: job_pb2.TrainingJob) -> None:
        num_unnoted = 0
        async for event in watch(self._database, cursor.job_id, cursor.sequence):
            if event.HasField("snapshot"):
                job = event.snapshot
                continue
            cursor = replace(cursor, sequence=event.sequence)
            num_unnoted += 1
            is_noted = await _to_its_end(
                self._tell_and_note(outlet, event, job, cursor, must_note=num_unnoted >= _NOTED_EVERY)
            )
            num_unnoted = 0 if is_noted else num_unnoted
        # The watch ended by itself: the job rests.
        job = await self._job(cursor.job_id)
        try:
            await outlet.finish(job)
        except OutletFailedError as error:
            await self._warn(cursor.job_id, cursor.name, error)
        await self._note(cursor, is_done=True)

    async def _tell_and_note(
        self,
        outlet: Outlet,
        event: job_pb2.TrainingJobEvent,
        job: job_pb2.TrainingJob,
        cursor: Cursor,
        *,
        must_note: bool,
    ) -> bool:
        """Tell one event; note the place, and return that it was, where it left this process or it is time to."""
        has_left = await self._tell(outlet, event, job, cursor.name)
        if has_left or must_note:
            await self._note(cursor, is_done=False)
        return has_left or must_note

    async def _tell(self, outlet: Outlet, event: job_pb2.TrainingJobEvent, job: job_pb2.TrainingJob, name: str) -> bool:
        if event.HasField("notice") and event.notice.reason.startswith(NOTICE_PREFIX):
            return False
        try:
            return await outlet.tell(event, job)
        except OutletFailedError as error:
            await self._warn(job.job_id, name, error)
            return True

    async def _give_up(self, cursor: Cursor) -> None:
        failure = OutletFailedError(message="it failed unexpectedly; the trainer's log has the details")
        await self._warn(cursor.job_id, cursor.name, failure)
        await self._note(cursor, is_done=True)

    async def _note(self, cursor: Cursor, *, is_done: bool) -> None:
        await self._database.run(lambda session: advance_cursor(session, cursor, is_done=is_done))

    async def _warn(self, job_id: str, name: str, error: OutletFailedError) -> None:
        logger.warning("%s: %s", name, error.message, extra={"job_id": job_id})
        reason = f"{NOTICE_PREFIX}FAILED"
        await self._database.run(lambda session: _append_warning(session, job_id, reason, f"{name}: {error.message}"))

    async def _job(self, job_id: str) -> job_pb2.TrainingJob:
        return await self._database.run(lambda session: job_message(get_job(session, job_id)))


async def _to_its_end(work: Coroutine[Any, Any, bool]) -> bool:
    """Await something that a cancellation shall not cut in two, for a while: what was sent is then noted too."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task}, timeout=_STOP_SECONDS)
        task.cancel()
        raise


def _append_warning(session: Session, job_id: str, reason: str, message: str) -> None:
    append_notice(session, get_job(session, job_id), WARNING, reason, message)
