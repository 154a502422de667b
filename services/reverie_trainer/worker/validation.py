"""Asking the sampler for pictures while training goes on; a sampler that is away costs pictures, never the job."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.json_format import MessageToDict, ParseDict
from reverie.common.v1.common_pb2 import ObjectRef
from reverie.sampling.v1.sampling_pb2 import SampleRequest, SampleResponse
from reverie_common.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ReverieError,
)
from reverie_common.rpc.channel import translated

from reverie_trainer.jobs.spec import Validation
from reverie_trainer.worker.outbox import Outbox
from reverie_trainer.worker.picture_report import PictureReport
from reverie_trainer.worker.picture_requests import count_pictures, picture_requests

if TYPE_CHECKING:
    from reverie.sampling.v1.sampling_pb2_grpc import SamplingServiceAsyncStub

logger = logging.getLogger(__name__)

MAX_DELAY_SECONDS = 5.0

_REFUSALS = (FailedPreconditionError, InvalidArgumentError, NotFoundError, PermissionDeniedError)
"""Answers that repeating does not change."""

_NO_CLIP_MODEL = "NO_CLIP_MODEL"
"""Reason of the sampler's refusal to score."""

OnResponse = Callable[[SampleResponse], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationRound:
    """The pictures of one step: a small thing, however many of them wait."""

    step: int
    """Optimiser steps done."""
    adapter: ObjectRef | None
    """The adapter of that step in the store; None is the base model."""
    weights: str = "adapter"
    """`adapter`, or `ema` for the running average."""

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        adapter = None if self.adapter is None else MessageToDict(self.adapter, preserving_proto_field_name=True)
        return {"step": self.step, "adapter": adapter, "weights": self.weights}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ValidationRound:
        """Out of a checkpoint."""
        adapter = None if record["adapter"] is None else ParseDict(record["adapter"], ObjectRef())
        return cls(step=int(record["step"]), adapter=adapter, weights=record.get("weights", "adapter"))


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationTiming:
    """How patient the worker is with the sampler."""

    stall_seconds: float = 300.0
    """Longest silence of a sampler at work: one step of the largest picture, or its turn in the queue."""
    compile_seconds: float = 1800.0
    """The same where it compiles first."""
    retry_seconds: float = 600.0
    """How long a sampler may be away before the pictures of a step are given up."""
    request_seconds: float = 3600.0
    """Longest time for one prompt at one size."""


class ValidationQueue:
    """Rounds that wait for the sampler, drawn one after the other. Belongs to the control thread's loop."""

    def __init__(
        self, stub: SamplingServiceAsyncStub, validation: Validation, *, outbox: Outbox, timing: ValidationTiming
    ) -> None:
        """Nothing is asked yet."""
        self._stub = stub
        self._validation = validation
        self._outbox = outbox
        self._timing = timing
        self._rounds: deque[ValidationRound] = deque()
        self._changed = asyncio.Event()
        self._stall_seconds = timing.compile_seconds if validation.compile else timing.stall_seconds
        self._last_answer = 0.0
        self._is_asking = False
        self._is_warned = False
        self._is_unscored = False
        self._noticed: set[str] = set()

    async def add(self, next_round: ValidationRound) -> None:
        """Ask for the pictures of a step when its turn comes."""
        self._rounds.append(next_round)
        self._changed.set()

    def pending(self) -> Sequence[ValidationRound]:
        """Rounds that are not drawn yet, the one being drawn first. Callable from any thread."""
        return tuple(self._rounds)

    async def run(self) -> None:
        """Draw rounds until cancelled."""
        while True:
            self._changed.clear()
            if not self._rounds:
                await self._changed.wait()
                continue
            await self._draw(self._rounds[0])
            self._rounds.popleft()

    async def drain(self, patience_seconds: float, should_stop: Callable[[], bool]) -> None:
        """Wait for the rounds that are left, for so long after the sampler's last answer; warn about what is lost.

        A sampler that has taken a request is at work and may be silent for longer: it compiles, or others are first.
        """
        clock = asyncio.get_running_loop().time
        begin = clock()
        while self._rounds and not should_stop():
            limit = max(patience_seconds, self._stall_seconds) if self._is_asking else patience_seconds
            if clock() - max(begin, self._last_answer) > limit:
                steps = ", ".join(str(left.step) for left in self._rounds)
                self._outbox.warn(
                    "VALIDATION_PICTURES_LOST",
                    f"the sampler did not answer for {limit:g} s after the last step; the pictures of step "
                    f"{steps} are missing or incomplete; draw them with `reverie sample` and the adapters of the job",
                )
                return
            await asyncio.sleep(0.05)

    async def _draw(self, current: ValidationRound) -> None:
        report = PictureReport(
            outbox=self._outbox,
            step=current.step,
            weights=current.weights,
            num_total=count_pictures(self._validation),
        )
        requests = picture_requests(self._validation, current.adapter, weights=current.weights)
        for prompt_name, request in requests:
            request.clip_score = request.clip_score and not self._is_unscored
            await self._persist(current.step, request, partial(report.add, prompt_name, request))
        report.finish()

    async def _persist(self, step: int, request: SampleRequest, on_response: OnResponse) -> None:
        """Ask until the pictures are there, the sampler refuses them, or it was away for too long."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._timing.retry_seconds
        delay = 0.2
        while True:
            try:
                return await self._ask(request, on_response)
            except _REFUSALS as error:
                if error.reason == _NO_CLIP_MODEL and request.clip_score:
                    self._go_unscored(request, error)
                    continue
                self._warn("VALIDATION_REFUSED", f"the sampler refused a picture of step {step}: {error.message}")
                return None
            except ReverieError as error:
                logger.info("the sampler gave no pictures of step %d: %s", step, error.message)
                if clock() + delay > deadline:
                    self._warn("VALIDATION_PICTURES_LOST", f"pictures of step {step} are given up: {error.message}")
                    return None
                self._warn_once(step, error)
                delay_now = max(delay, error.retry_after_seconds or 0.0)
            await asyncio.sleep(delay_now)
            delay = min(2 * delay, MAX_DELAY_SECONDS)

    def _go_unscored(self, request: SampleRequest, error: ReverieError) -> None:
        """A score that cannot be had must not cost the picture."""
        request.clip_score = False
        self._is_unscored = True
        self._notice_once("CLIP_SCORE_LOST", f"the pictures of this job are not scored: {error.message}")

    async def _ask(self, request: SampleRequest, on_response: OnResponse) -> None:
        clock = asyncio.get_running_loop().time
        begin = clock()
        call = self._stub.Sample(request, timeout=self._timing.request_seconds)
        self._is_asking = True
        try:
            with translated():
                while (response := await self._next(call)) is not None:
                    self._last_answer = clock()
                    self._is_warned = False
                    if response.HasField("notice"):
                        self._notice_once(response.notice.reason, response.notice.message)
                    on_response(response)
        finally:
            self._is_asking = False
            call.cancel()
        self._outbox.phase("validate", clock() - begin)

    async def _next(self, call: grpc.aio.UnaryStreamCall[SampleRequest, SampleResponse]) -> SampleResponse | None:
        try:
            async with asyncio.timeout(self._stall_seconds):
                response = await call.read()
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"the sampler was silent for {self._stall_seconds:g} s; restart it", reason="SAMPLER_STALLED"
            ) from error
        return response if isinstance(response, SampleResponse) else None

    def _notice_once(self, reason: str, message: str) -> None:
        """What the sampler says of one picture it would say of all."""
        if reason not in self._noticed:
            self._noticed.add(reason)
            self._warn(reason, message)

    def _warn_once(self, step: int, error: ReverieError) -> None:
        if not self._is_warned:
            self._is_warned = True
            self._warn(
                "SAMPLER_UNAVAILABLE",
                f"no pictures of step {step} yet: {error.message}; training goes on, and they are asked for again for "
                f"{self._timing.retry_seconds:g} s: start the sampler",
            )

    def _warn(self, reason: str, message: str) -> None:
        logger.warning("%s", message)
        self._outbox.warn(reason, message)
