"""Drives every job on: QUEUED -> PREPARING -> TRAINING -> SUCCEEDED | FAILED | CANCELLED.

All that it needs to go on after a restart is in the database; what is kept here is only who was heard from when.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass

from reverie.training.v1 import job_pb2
from reverie_common.errors import ReverieError
from sqlalchemy.orm import Session

from reverie_trainer import metrics
from reverie_trainer.jobs.preparing.preparation import PreparationResult, PreparationTask, Preparer
from reverie_trainer.jobs.running.failures import JobFailedError, failure_from_error
from reverie_trainer.jobs.running.launcher import Launcher
from reverie_trainer.jobs.spec import spec_from_proto
from reverie_trainer.jobs.state.changes import wait_for
from reverie_trainer.jobs.state.database import Database
from reverie_trainer.jobs.state.events import append, append_notice
from reverie_trainer.jobs.state.leases import note_exit, note_launch, note_process
from reverie_trainer.jobs.state.records import PREPARING, QUEUED, TRAINING, read_spec
from reverie_trainer.jobs.state.repository import (
    WARNING,
    ActiveJob,
    active_jobs,
    begin_preparation,
    fail_job,
    finish_cancellation,
    finish_preparation,
    get_job,
    lingering_workers,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconcilerLimits:
    """How patient the reconciler is."""

    max_concurrent_jobs: int
    """Jobs in PREPARING or TRAINING at a time; others wait in QUEUED."""
    lease_seconds: float
    """Without a report for so long, a worker is taken for dead."""
    start_seconds: float
    """A worker that has not leased its job after so long is taken for dead."""
    stop_seconds: float
    """A worker that was told to stop and runs on after so long is killed."""
    max_starts_without_progress: int
    """After so many starts that lead to no further step a job fails."""
    tick_seconds: float
    """Workers and leases are looked at this often; changes of jobs are seen at once."""


class Reconciler:
    """Looks at every job that is not at rest, again and again, and does what is next for it."""

    def __init__(self, database: Database, preparer: Preparer, limits: ReconcilerLimits) -> None:
        self.is_stopping = False
        self._database = database
        self._preparer = preparer
        self._launcher: Launcher
        self._limits = limits
        self._preparations: dict[str, asyncio.Task[None]] = {}
        self._heard: dict[str, float] = {}
        self._restart_at: dict[str, float] = {}
        self._lingering: dict[str, float] = {}
        self._loop: asyncio.Task[None] | None = None

    def start(self, launcher: Launcher) -> None:
        """Begin to drive jobs, with workers from `launcher`."""
        self._launcher = launcher
        self._loop = asyncio.create_task(self._run(), name="reconciler")

    def heard_from(self, job_id: str) -> None:
        """Note that the job's worker is alive."""
        self._heard[job_id] = time.monotonic()

    async def stop(self) -> None:
        """Stop driving; workers are told to save and exit, and killed after `stop_seconds`. Jobs stay as they are."""
        self.is_stopping = True
        if self._loop is None:
            return
        # Not cancelled: a worker that a thread is starting right now has to be noted, so that it is stopped too.
        self._database.changes.announce_any()
        await self._loop
        for task in list(self._preparations.values()):
            task.cancel()
        await asyncio.gather(*self._preparations.values(), return_exceptions=True)
        await self._stop_workers()
        await asyncio.to_thread(self._launcher.close)

    async def _run(self) -> None:
        while not self.is_stopping:
            signal = self._database.changes.any_signal()
            try:
                await self._drive_all()
            except Exception:
                # The boundary: one error, of the database for instance, must not end the driving of all jobs.
                logger.exception("driving the jobs failed; trying again")
            await wait_for(signal, self._limits.tick_seconds)

    async def _drive_all(self) -> None:
        jobs = await self._database.run(active_jobs)
        metrics.count_jobs([job.state for job in jobs])
        at_work = {job.job_id for job in jobs if job.state in (PREPARING, TRAINING)}
        for job_id in self._preparations.keys() - {job.job_id for job in jobs if job.state == PREPARING}:
            self._preparations[job_id].cancel()
        for job in jobs:
            if self.is_stopping:
                return
            if job.state == QUEUED and len(at_work) < self._limits.max_concurrent_jobs:
                at_work.add(job.job_id)
                await self._database.run(lambda session, job_id=job.job_id: begin_preparation(session, job_id))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
                self._ensure_preparation(job.job_id)
            elif job.state == PREPARING:
                self._ensure_preparation(job.job_id)
            elif job.state == TRAINING:
                await self._drive_training(job)
        await self._clear_up_after_jobs()
        if len(at_work) < self._limits.max_concurrent_jobs:
            await asyncio.to_thread(self._launcher.warm_up)

    async def _clear_up_after_jobs(self) -> None:
        """Forget the workers of jobs at rest once they have exited; one that stays holds memory and is killed."""
        for job_id, process in (await self._database.run(lingering_workers)).items():
            since = self._lingering.setdefault(job_id, time.monotonic())
            if not await asyncio.to_thread(self._launcher.is_alive, process):
                del self._lingering[job_id]
                await self._forget_worker(job_id, process)
            elif time.monotonic() - since > self._limits.stop_seconds:
                logger.warning("worker did not exit after its job and is killed", extra={"job_id": job_id})
                await asyncio.to_thread(self._launcher.kill, process)

    async def _forget_worker(self, job_id: str, process: Mapping[str, str]) -> None:
        await self._database.run(lambda session: note_exit(session, job_id, process))

    def _ensure_preparation(self, job_id: str) -> None:
        if job_id in self._preparations:
            return
        task = asyncio.create_task(self._prepare(job_id), name=f"prepare {job_id}")
        self._preparations[job_id] = task
        task.add_done_callback(lambda _: self._preparations.pop(job_id, None))

    async def _prepare(self, job_id: str) -> None:
        begin = time.monotonic()
        try:
            result = await self._preparer.prepare(await self._preparation_task(job_id))
        except JobFailedError as error:
            await self._fail(job_id, error)
        except ReverieError as error:
            await self._fail(job_id, failure_from_error(error))
        except Exception:
            # The boundary: a bug must end this job with a reason, and no other.
            logger.exception("preparation failed", extra={"job_id": job_id})
            await self._fail(job_id, _bug())
        else:
            await self._finish(job_id, result, time.monotonic() - begin)

    async def _finish(self, job_id: str, result: PreparationResult, seconds: float) -> None:
        await self._database.run(
            lambda session: finish_preparation(
                session, job_id, result.manifest, result.report, seconds, result.max_steps
            )
        )
        metrics.count_preparation(result.report)

    async def _preparation_task(self, job_id: str) -> PreparationTask:
        row = await self._database.run(lambda session: get_job(session, job_id))

        async def on_progress(progress: job_pb2.PreparationProgress) -> None:
            await self._database.run(lambda session: _note_progress(session, job_id, progress))

        async def notice(reason: str, message: str) -> None:
            await self._database.run(lambda session: _note(session, job_id, reason, message))

        return PreparationTask(
            spec=spec_from_proto(read_spec(row)),
            dataset_versions=row.dataset_versions,
            on_progress=on_progress,
            notice=notice,
        )

    async def _drive_training(self, job: ActiveJob) -> None:
        if job.worker_process is None:
            await self._without_worker(job)
            return
        if not await asyncio.to_thread(self._launcher.is_alive, job.worker_process):
            await self._worker_gone(job, "its process ended")
        elif job.cancel_time is not None and time.time() - job.cancel_time > self._limits.stop_seconds:
            await self._kill(job, "it did not stop in time")
        elif self._is_silent(job):
            await self._kill(job, "it was silent for too long")

    async def _without_worker(self, job: ActiveJob) -> None:
        if job.cancel_time is not None:
            await self._database.run(lambda session: finish_cancellation(session, job.job_id, "cancelled by request"))
        elif job.starts_without_progress >= self._limits.max_starts_without_progress:
            await self._fail(job.job_id, _crashed(job.starts_without_progress, "it could not be started", []))
        elif time.monotonic() >= self._restart_at.get(job.job_id, 0.0):
            await self._launch(job)

    async def _launch(self, job: ActiveJob) -> None:
        token = secrets.token_urlsafe(32)
        number = await self._database.run(lambda session: note_launch(session, job.job_id, token))
        if number is None:
            return
        self.heard_from(job.job_id)
        process = await asyncio.to_thread(self._launcher.start, job.job_id, token, number)
        metrics.WORKER_STARTS.inc()
        await self._database.run(lambda session: note_process(session, job.job_id, process))

    def _is_silent(self, job: ActiveJob) -> bool:
        # A trainer that was just started has heard from nobody yet; the clock begins now.
        heard = self._heard.setdefault(job.job_id, time.monotonic())
        limit_seconds = self._limits.lease_seconds if job.has_lease else self._limits.start_seconds
        return time.monotonic() - heard > limit_seconds

    async def _kill(self, job: ActiveJob, why: str) -> None:
        if job.worker_process is not None:
            await asyncio.to_thread(self._launcher.kill, job.worker_process)
        await self._worker_gone(job, why)

    async def _worker_gone(self, job: ActiveJob, why: str) -> None:
        """Clear up after a worker: the job is cancelled, given up, or gets another worker."""
        process = job.worker_process or {}
        lines = await asyncio.to_thread(self._launcher.last_lines, process)
        self._heard.pop(job.job_id, None)
        if job.cancel_time is not None:
            await self._database.run(lambda session: finish_cancellation(session, job.job_id, f"cancelled; {why}"))
            return
        num_starts = await self._database.run(lambda session: _note_worker_gone(session, job.job_id, process, why))
        if num_starts is None:
            return
        logger.warning("worker lost: %s", why, extra={"job_id": job.job_id})
        if num_starts >= self._limits.max_starts_without_progress:
            await self._fail(job.job_id, _crashed(num_starts, why, lines))
            return
        self._restart_at[job.job_id] = time.monotonic() + _pause_seconds(num_starts)

    async def _fail(self, job_id: str, failure: JobFailedError) -> None:
        logger.warning("job failed: %s", failure.message, extra={"job_id": job_id, "reason": failure.reason})
        await self._database.run(lambda session: fail_job(session, job_id, failure.to_proto()))

    async def _stop_workers(self) -> None:
        """Tell every worker to save and exit, wait for it, kill what stays."""
        jobs = await self._database.run(active_jobs)
        processes = [job.worker_process for job in jobs if job.worker_process is not None]
        processes += (await self._database.run(lingering_workers)).values()
        for process in processes:
            await asyncio.to_thread(self._launcher.stop, process)
        deadline = time.monotonic() + self._limits.stop_seconds
        while processes and time.monotonic() < deadline:
            processes = [process for process in processes if self._launcher.is_alive(process)]
            await asyncio.sleep(0.05)
        for process in processes:
            logger.warning("worker did not stop in time and is killed", extra={"worker_pid": process.get("pid", "")})
            self._launcher.kill(process)


def _note_progress(session: Session, job_id: str, progress: job_pb2.PreparationProgress) -> None:
    row = get_job(session, job_id)
    if row.state == PREPARING:
        append(session, row, preparation=progress)


def _note(session: Session, job_id: str, reason: str, message: str) -> None:
    append_notice(session, get_job(session, job_id), WARNING, reason, message)


def _note_worker_gone(session: Session, job_id: str, process: Mapping[str, str], why: str) -> int | None:
    """Note a worker that is gone; return its job's starts without progress, None when that does not matter any more."""
    row = get_job(session, job_id)
    had_orderly_end = row.token_digest is None
    note_exit(session, job_id, process)
    if row.state != TRAINING or had_orderly_end:
        return None
    append_notice(session, row, WARNING, "WORKER_LOST", f"the worker was lost ({why}); another one goes on")
    return row.starts_without_progress


def _pause_seconds(num_starts: int) -> float:
    """Return how long to wait before another start: not at all at first, for a killed worker; then longer."""
    return 0.0 if num_starts <= 1 else 2.0 ** (num_starts - 1)


def _crashed(num_starts: int, why: str, lines: list[str]) -> JobFailedError:
    log = "\n".join(lines)
    return JobFailedError(
        "WORKER_CRASHED",
        f"{num_starts} workers in a row made no progress, the last one was lost ({why}). The end of its log:\n{log}",
        "Correct what the log says, then resume the job from its newest checkpoint (`reverie job resume JOB_ID`).",
    )


def _bug() -> JobFailedError:
    return JobFailedError(
        "INTERNAL",
        "preparation failed unexpectedly; the trainer's log has the details",
        "Resume the job to try again (`reverie job resume JOB_ID`); report it if it happens again.",
    )
