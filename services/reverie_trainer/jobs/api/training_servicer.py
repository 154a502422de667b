"""TrainingService: the contract on one side, transactions on the other."""

# ruff: noqa: ARG002, N802 - the contract names the methods and what they are given

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc.aio
from reverie.training.v1 import training_pb2, training_pb2_grpc
from reverie_common.errors import FieldViolation, InvalidArgumentError
from reverie_common.storage import ObjectStore
from sqlalchemy.orm import Session

from reverie_trainer.jobs.admission.admission import Admission
from reverie_trainer.jobs.admission.examination import Examiner
from reverie_trainer.jobs.api.paging import MAX_PAGE_BYTES, read_page, write_token
from reverie_trainer.jobs.api.requests import check_request_id, digest_of, find_repetition, remember
from reverie_trainer.jobs.outlets import outlet_names
from reverie_trainer.jobs.outlets.cursors import open_cursors, reopen_cursors
from reverie_trainer.jobs.preparing.buckets import without_filled_steps
from reverie_trainer.jobs.spec import JobSpec, Start, spec_from_proto, spec_to_proto
from reverie_trainer.jobs.state.artifacts import artifact_message
from reverie_trainer.jobs.state.checkpoints import checkpoint_steps, forget_later_checkpoints
from reverie_trainer.jobs.state.database import Database
from reverie_trainer.jobs.state.events import append_notice, watch
from reverie_trainer.jobs.state.models import JobRow
from reverie_trainer.jobs.state.records import job_message, new_job_id, read_spec
from reverie_trainer.jobs.state.repository import (
    WARNING,
    create_job,
    get_job,
    list_artifacts,
    list_checkpoints,
    list_jobs,
    request_cancellation,
    request_validation,
    require_resumable,
    resume_job,
)
from reverie_trainer.jobs.state.starts import Starts

Context = grpc.aio.ServicerContext[Any, Any]


class TrainingServicer(training_pb2_grpc.TrainingServiceServicer):
    """Serves reverie.training.v1.TrainingService."""

    def __init__(self, database: Database, store: ObjectStore, examiner: Examiner, starts: Starts) -> None:
        self._database = database
        self._store = store
        self._examiner = examiner
        self._starts = starts

    async def CheckTrainingJob(
        self, request: training_pb2.CheckTrainingJobRequest, context: Context
    ) -> training_pb2.CheckTrainingJobResponse:
        """See the contract."""
        return await self._examiner.check(spec_from_proto(request.spec))

    async def CreateTrainingJob(
        self, request: training_pb2.CreateTrainingJobRequest, context: Context
    ) -> training_pb2.CreateTrainingJobResponse:
        """See the contract."""
        check_request_id(request.request_id)
        row = await self._create(_Creation(spec=spec_from_proto(request.spec), request_id=request.request_id))
        return training_pb2.CreateTrainingJobResponse(job=job_message(row))

    async def ForkTrainingJob(
        self, request: training_pb2.ForkTrainingJobRequest, context: Context
    ) -> training_pb2.ForkTrainingJobResponse:
        """See the contract."""
        check_request_id(request.request_id)
        source = await self._database.run(lambda session: read_spec(get_job(session, request.job_id)))
        given = request.HasField("spec")
        spec = spec_from_proto(request.spec) if given else without_filled_steps(spec_from_proto(source))
        start = Start(job_id=request.job_id, step=request.step, adapter_only=request.adapter_only)
        creation = _Creation(spec=replace(spec, start=start), request_id=request.request_id, method="ForkTrainingJob")
        return training_pb2.ForkTrainingJobResponse(job=job_message(await self._create(creation)))

    async def _create(self, creation: "_Creation") -> JobRow:
        row = await self._database.run(lambda session: _find_created(session, creation))
        if row is not None:
            # A repetition is answered before the job is checked again: its datasets may be gone by now.
            return row
        admission = await self._examiner.admit(creation.spec)
        admission.require()
        admission = replace(admission, spec=await self._starts.resolve(admission.spec))
        job_id = new_job_id()
        # Before the job is there: a worker that leases it finds its start.
        await self._starts.carry_out(admission.spec, job_id)
        warnings = self._examiner.warnings_of(admission)
        return await self._database.run(lambda session: _create(session, creation, admission, warnings, job_id))

    async def GetTrainingJob(
        self, request: training_pb2.GetTrainingJobRequest, context: Context
    ) -> training_pb2.GetTrainingJobResponse:
        """See the contract."""
        row = await self._database.run(lambda session: get_job(session, request.job_id))
        return training_pb2.GetTrainingJobResponse(job=job_message(row))

    async def ListTrainingJobs(
        self, request: training_pb2.ListTrainingJobsRequest, context: Context
    ) -> training_pb2.ListTrainingJobsResponse:
        """See the contract."""
        page = read_page(request.page_size, request.page_token, "jobs")
        before_id = int(page.after) if page.after is not None else None
        rows = await self._database.run(
            lambda session: list_jobs(session, list(request.states), before_id, page.size + 1)
        )
        response = training_pb2.ListTrainingJobsResponse()
        num_bytes = 0
        for row in rows[: page.size]:
            job = job_message(row)
            num_bytes += job.ByteSize()
            if response.jobs and num_bytes > MAX_PAGE_BYTES:
                break
            response.jobs.append(job)
        if len(response.jobs) < len(rows):
            response.next_page_token = write_token("jobs", str(rows[len(response.jobs) - 1].id))
        return response

    async def CancelTrainingJob(
        self, request: training_pb2.CancelTrainingJobRequest, context: Context
    ) -> training_pb2.CancelTrainingJobResponse:
        """See the contract."""
        check_request_id(request.request_id)
        row = await self._database.run(lambda session: _cancel(session, request.job_id, request.request_id))
        return training_pb2.CancelTrainingJobResponse(job=job_message(row))

    async def ResumeTrainingJob(
        self, request: training_pb2.ResumeTrainingJobRequest, context: Context
    ) -> training_pb2.ResumeTrainingJobResponse:
        """See the contract."""
        check_request_id(request.request_id)
        repeated = await self._database.run(
            lambda session: find_repetition(session, "ResumeTrainingJob", request.request_id, request.job_id)
        )
        if request.step and repeated is None:
            await self._rewind(request.job_id, request.step)
        row = await self._database.run(lambda session: _resume(session, request))
        return training_pb2.ResumeTrainingJobResponse(job=job_message(row))

    async def _rewind(self, job_id: str, step: int) -> None:
        """Forget a job's checkpoints after a step, at which it has one."""
        await self._database.run(lambda session: require_resumable(get_job(session, job_id)))
        steps = await asyncio.to_thread(checkpoint_steps, self._store, job_id)
        if step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            description = f"job {job_id} has no checkpoint of step {step}; there are {known}, and 0 is the newest"
            raise InvalidArgumentError(
                description,
                reason="NO_SUCH_CHECKPOINT",
                violations=[FieldViolation(field="step", description=description)],
            )
        await asyncio.to_thread(forget_later_checkpoints, self._store, job_id, step)

    async def RequestValidation(
        self, request: training_pb2.RequestValidationRequest, context: Context
    ) -> training_pb2.RequestValidationResponse:
        """See the contract."""
        check_request_id(request.request_id)
        row = await self._database.run(lambda session: _request_validation(session, request.job_id, request.request_id))
        return training_pb2.RequestValidationResponse(job=job_message(row))

    async def WatchTrainingJob(
        self, request: training_pb2.WatchTrainingJobRequest, context: Context
    ) -> AsyncIterator[training_pb2.WatchTrainingJobResponse]:
        """See the contract."""
        async for event in watch(self._database, request.job_id, request.after_sequence):
            yield training_pb2.WatchTrainingJobResponse(event=event)

    async def ListCheckpoints(
        self, request: training_pb2.ListCheckpointsRequest, context: Context
    ) -> training_pb2.ListCheckpointsResponse:
        """See the contract."""
        page = read_page(request.page_size, request.page_token, "checkpoints")
        before_step = int(page.after) if page.after is not None else None
        found = await self._database.run(
            lambda session: list_checkpoints(session, request.job_id, before_step, page.size + 1)
        )
        shown = found[: page.size]
        token = write_token("checkpoints", str(shown[-1].step)) if len(found) > page.size else ""
        return training_pb2.ListCheckpointsResponse(checkpoints=shown, next_page_token=token)

    async def ListArtifacts(
        self, request: training_pb2.ListArtifactsRequest, context: Context
    ) -> training_pb2.ListArtifactsResponse:
        """See the contract."""
        page = read_page(request.page_size, request.page_token, "artifacts")
        found = await self._database.run(
            lambda session: list_artifacts(session, request.job_id, page.after, page.size + 1)
        )
        shown = found[: page.size]
        artifacts = await asyncio.to_thread(
            lambda: [artifact_message(self._store, path, reference) for path, reference in shown]
        )
        token = write_token("artifacts", shown[-1][0]) if len(found) > page.size else ""
        return training_pb2.ListArtifactsResponse(artifacts=artifacts, next_page_token=token)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Creation:
    """A job that somebody asked for."""

    spec: JobSpec
    request_id: str
    method: str = "CreateTrainingJob"

    @property
    def digest(self) -> str:
        return digest_of(spec_to_proto(self.spec))


def _find_created(session: Session, creation: _Creation) -> JobRow | None:
    job_id = find_repetition(session, creation.method, creation.request_id, creation.digest)
    return get_job(session, job_id) if job_id is not None else None


def _create(
    session: Session, creation: _Creation, admission: Admission, warnings: Sequence[tuple[str, str]], job_id: str
) -> JobRow:
    # Asked again: the same request may have arrived twice at the same time.
    row = _find_created(session, creation)
    if row is None:
        row = create_job(session, spec_to_proto(admission.spec), admission.versions, job_id)
        open_cursors(session, job_id, outlet_names(admission.spec))
        for reason, message in warnings:
            append_notice(session, row, WARNING, reason, message)
        remember(session, creation.method, creation.request_id, creation.digest, row.job_id)
    return row


def _cancel(session: Session, job_id: str, request_id: str) -> JobRow:
    if find_repetition(session, "CancelTrainingJob", request_id, job_id) is not None:
        return get_job(session, job_id)
    row = request_cancellation(session, job_id)
    remember(session, "CancelTrainingJob", request_id, job_id, job_id)
    return row


def _resume(session: Session, request: training_pb2.ResumeTrainingJobRequest) -> JobRow:
    job_id = request.job_id
    if find_repetition(session, "ResumeTrainingJob", request.request_id, job_id) is not None:
        return get_job(session, job_id)
    row = resume_job(session, job_id, request.step)
    reopen_cursors(session, job_id)
    remember(session, "ResumeTrainingJob", request.request_id, job_id, job_id)
    return row


def _request_validation(session: Session, job_id: str, request_id: str) -> JobRow:
    if find_repetition(session, "RequestValidation", request_id, job_id) is not None:
        return get_job(session, job_id)
    row = request_validation(session, job_id)
    remember(session, "RequestValidation", request_id, job_id, job_id)
    return row
