"""WorkerService: what workers tell the trainer."""

# ruff: noqa: ARG002, N802 - the contract names the methods and what they are given

import asyncio
from typing import Any

import grpc.aio
from reverie.training.v1 import training_pb2, training_pb2_grpc
from reverie_common.storage import ObjectStore

from reverie_trainer.jobs.running.reconciler import Reconciler
from reverie_trainer.jobs.state.checkpoints import newest_checkpoint
from reverie_trainer.jobs.state.database import Database
from reverie_trainer.jobs.state.leases import check_completion, complete_job, lease_job, record_progress
from reverie_trainer.jobs.state.records import read_record

Context = grpc.aio.ServicerContext[Any, Any]


class WorkerServicer(training_pb2_grpc.WorkerServiceServicer):
    """Serves reverie.training.v1.WorkerService."""

    def __init__(self, database: Database, store: ObjectStore, reconciler: Reconciler, lease_seconds: float) -> None:
        self._database = database
        self._store = store
        self._reconciler = reconciler
        self._lease_seconds = lease_seconds

    async def LeaseJob(self, request: training_pb2.LeaseJobRequest, context: Context) -> training_pb2.LeaseJobResponse:
        """See the contract."""
        lease = await self._database.run(lambda session: lease_job(session, request))
        self._reconciler.heard_from(lease.job.job_id)
        response = training_pb2.LeaseJobResponse(
            lease_id=lease.lease_id, job=lease.job, prepared=lease.prepared, lease_seconds=self._lease_seconds
        )
        checkpoint = await asyncio.to_thread(newest_checkpoint, self._store, lease.job.job_id)
        if checkpoint is not None:
            response.checkpoint.CopyFrom(checkpoint)
        return response

    async def ReportProgress(
        self, request: training_pb2.ReportProgressRequest, context: Context
    ) -> training_pb2.ReportProgressResponse:
        """See the contract."""
        row = await self._database.run(lambda session: record_progress(session, request))
        self._reconciler.heard_from(row.job_id)
        should_stop = row.cancel_time is not None or self._reconciler.is_stopping
        return training_pb2.ReportProgressResponse(
            should_stop=should_stop, num_validation_requests=read_record(row).num_validation_requests
        )

    async def CompleteJob(
        self, request: training_pb2.CompleteJobRequest, context: Context
    ) -> training_pb2.CompleteJobResponse:
        """See the contract."""
        check_completion(request)
        await self._database.run(lambda session: complete_job(session, request))
        return training_pb2.CompleteJobResponse()
