"""The worker's side of WorkerService: lease, reports, completion; patient with a trainer that is being restarted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from reverie.training.v1.training_pb2 import (
    CompleteJobRequest,
    LeaseJobRequest,
    LeaseJobResponse,
    ReportProgressRequest,
    ReportProgressResponse,
)
from reverie_common.errors import (
    AbortedError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ReverieError,
    UnauthenticatedError,
)
from reverie_common.rpc.channel import translated

from reverie_trainer.worker.orders import Order, Orders
from reverie_trainer.worker.outbox import Outbox, Report

if TYPE_CHECKING:
    from reverie.training.v1.training_pb2_grpc import WorkerServiceAsyncStub

logger = logging.getLogger(__name__)

Response = TypeVar("Response")

MAX_DELAY_SECONDS = 5.0
CALL_TIMEOUT_SECONDS = 15.0

_FINAL_ERRORS = (
    AbortedError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
"""Answers that repeating does not change: the job is no longer ours, or never was."""


class LeaseLostError(Exception):
    """The trainer says that this worker has no lease."""


class TrainerGoneError(Exception):
    """The trainer did not answer for as long as we are patient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportTiming:
    """When to report."""

    interval_seconds: float = 0.5
    """Between two looks into the outbox."""
    heartbeat_seconds: float = 1.0
    """Longest time without a report: how late the worker learns that it should stop."""
    patience_seconds: float = 600.0
    """How long the trainer may be away."""


class TrainerLink:
    """All calls to the trainer, from the control thread's loop only."""

    def __init__(self, stub: WorkerServiceAsyncStub, *, outbox: Outbox, orders: Orders, timing: ReportTiming) -> None:
        """Use a stub; nothing is called yet."""
        self._stub = stub
        self._outbox = outbox
        self._orders = orders
        self._timing = timing
        self._lease_id = ""
        self._sequence = 0
        self._is_closing = asyncio.Event()
        self._reports = asyncio.Lock()

    async def lease(self, *, job_id: str, worker_id: str, token: str) -> LeaseJobResponse:
        """Take the job.

        Raises:
            LeaseLostError: the trainer does not give it to us.
            TrainerGoneError: it does not answer.
        """
        request = LeaseJobRequest(job_id=job_id, worker_id=worker_id, worker_token=token)
        response = await self._patiently(lambda: self._stub.LeaseJob(request, timeout=CALL_TIMEOUT_SECONDS))
        self._lease_id = response.lease_id
        self._orders.note_picture_requests(response.job.num_validation_requests, are_new=False)
        return response

    async def report(self) -> None:
        """Report until closed or until an order ends it; the order is left with the loop."""
        last = asyncio.get_running_loop().time()
        while not self._is_closing.is_set():
            await self._pause()
            report = self._outbox.take()
            now = asyncio.get_running_loop().time()
            if not report and now - last < self._timing.heartbeat_seconds:
                continue
            if not await self._deliver(report):
                return
            last = now

    async def complete(self, request: CompleteJobRequest) -> None:
        """Report what is left, then end the lease with its outcome.

        Raises:
            LeaseLostError, TrainerGoneError: the trainer will not know.
        """
        self._is_closing.set()
        while report := self._outbox.take():
            if not await self._deliver(report):
                raise (LeaseLostError if self._orders.current is Order.LEAVE else TrainerGoneError)(self._orders.why)
        request.lease_id = self._lease_id
        await self._patiently(lambda: self._stub.CompleteJob(request, timeout=CALL_TIMEOUT_SECONDS))

    async def _pause(self) -> None:
        try:
            # wait_for would swallow a cancellation that arrives with the event (Python 3.11).
            async with asyncio.timeout(self._timing.interval_seconds):
                await self._is_closing.wait()
        except TimeoutError:
            return

    async def _deliver(self, report: Report) -> bool:
        # complete() and report() may meet; reports leave one at a time and in order.
        async with self._reports:
            try:
                response = await self._send(report)
            except LeaseLostError as error:
                self._orders.give(Order.LEAVE, str(error))
                return False
            except TrainerGoneError as error:
                self._orders.give(Order.DESERT, str(error))
                return False
        self._orders.note_picture_requests(response.num_validation_requests)
        if response.should_stop:
            self._orders.give(Order.STOP, "the trainer asked to stop")
        return True

    async def _send(self, report: Report) -> ReportProgressResponse:
        # The number is given once and repeated with every attempt: the trainer records a report at most once.
        self._sequence += 1
        request = ReportProgressRequest(
            lease_id=self._lease_id,
            report_sequence=self._sequence,
            events=report.events,
            phases=report.phases,
            adapter_report=report.adapter,
        )
        return await self._patiently(lambda: self._stub.ReportProgress(request, timeout=CALL_TIMEOUT_SECONDS))

    async def _patiently(self, call: Callable[[], Awaitable[Response]]) -> Response:
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._timing.patience_seconds
        delay = 0.1
        while True:
            try:
                with translated():
                    return await call()
            except _FINAL_ERRORS as error:
                raise LeaseLostError(error.message) from error
            except ReverieError as error:
                if clock() + delay > deadline:
                    raise TrainerGoneError(
                        f"the trainer did not answer for {self._timing.patience_seconds:g} s: {error.message}"
                    ) from error
                logger.warning("the trainer does not answer, trying again in %.1f s: %s", delay, error.message)
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_DELAY_SECONDS)
