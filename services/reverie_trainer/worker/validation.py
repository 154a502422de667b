"""Asking the sampler for pictures while training goes on; a sampler that is away costs pictures, never the job."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.json_format import MessageToDict, ParseDict
from reverie.common.v1.common_pb2 import ObjectRef
from reverie.sampling.v1.sampling_pb2 import SampledImage, SampleRequest, SampleResponse
from reverie.training.v1.job_pb2 import ValidationImage
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

if TYPE_CHECKING:
    from reverie.sampling.v1.sampling_pb2_grpc import SamplingServiceAsyncStub

logger = logging.getLogger(__name__)

MAX_DELAY_SECONDS = 5.0

_REFUSALS = (FailedPreconditionError, InvalidArgumentError, NotFoundError, PermissionDeniedError)
"""Answers that repeating does not change."""


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
        self._last_answer = 0.0
        self._is_warned = False

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
        """Wait for the rounds that are left, for so long after the sampler's last answer; warn about what is lost."""
        clock = asyncio.get_running_loop().time
        begin = clock()
        while self._rounds and not should_stop():
            if clock() - max(begin, self._last_answer) > patience_seconds:
                steps = ", ".join(str(left.step) for left in self._rounds)
                self._outbox.warn(
                    "VALIDATION_PICTURES_LOST",
                    f"the sampler did not answer for {patience_seconds:g} s after the last step; the pictures of step "
                    f"{steps} are missing or incomplete; draw them with `reverie sample` and the adapters of the job",
                )
                return
            await asyncio.sleep(0.05)

    async def _draw(self, current: ValidationRound) -> None:
        pictures = _Progress(
            outbox=self._outbox, step=current.step, weights=current.weights, num_total=self._num_pictures()
        )
        for prompt_name, request in self._requests(current):
            await self._persist(current.step, request, partial(pictures.add, prompt_name))

    def _num_pictures(self) -> int:
        return len(self._validation.prompts) * len(self._validation.resolutions) * self._validation.num_images

    def _requests(self, current: ValidationRound) -> Iterator[tuple[str, SampleRequest]]:
        for prompt in self._validation.prompts:
            for resolution in self._validation.resolutions:
                width, height = resolution.lower().split("x")
                yield (
                    prompt.name,
                    SampleRequest(
                        prompt=prompt.prompt,
                        negative_prompt=self._validation.negative_prompt,
                        width=int(width),
                        height=int(height),
                        num_inference_steps=self._validation.num_inference_steps,
                        guidance_scale=self._validation.guidance_scale,
                        seed=self._validation.seed,
                        num_images=self._validation.num_images,
                        adapter=current.adapter,
                        adapter_strength=self._validation.adapter_strength,
                    ),
                )

    async def _persist(self, step: int, request: SampleRequest, on_image: Callable[[SampledImage], None]) -> None:
        """Ask until the pictures are there, the sampler refuses them, or it was away for too long."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._timing.retry_seconds
        delay = 0.2
        while True:
            try:
                return await self._ask(request, on_image)
            except _REFUSALS as error:
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

    async def _ask(self, request: SampleRequest, on_image: Callable[[SampledImage], None]) -> None:
        clock = asyncio.get_running_loop().time
        begin = clock()
        call = self._stub.Sample(request, timeout=self._timing.request_seconds)
        try:
            with translated():
                while (response := await self._next(call)) is not None:
                    self._last_answer = clock()
                    self._is_warned = False
                    if response.HasField("image"):
                        on_image(response.image)
        finally:
            call.cancel()
        self._outbox.phase("validate", clock() - begin)

    async def _next(self, call: grpc.aio.UnaryStreamCall[SampleRequest, SampleResponse]) -> SampleResponse | None:
        try:
            async with asyncio.timeout(self._timing.stall_seconds):
                response = await call.read()
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"the sampler was silent for {self._timing.stall_seconds:g} s; restart it", reason="SAMPLER_STALLED"
            ) from error
        return response if isinstance(response, SampleResponse) else None

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


@dataclass(kw_only=True, slots=True)
class _Progress:
    """Reports the pictures of one round, each once, however often it is answered."""

    outbox: Outbox
    step: int
    weights: str
    num_total: int
    _seen: set[tuple[str, int, int, int]] = field(default_factory=set)

    def add(self, prompt_name: str, image: SampledImage) -> None:
        identity = (prompt_name, image.width, image.height, image.image_index)
        if identity in self._seen:
            return
        self._seen.add(identity)
        self.outbox.image(
            ValidationImage(
                step=self.step,
                prompt_name=prompt_name,
                image_index=image.image_index,
                width=image.width,
                height=image.height,
                image=image.image,
                weights=self.weights,
            )
        )
        self.outbox.validation_progress(step=self.step, num_done=len(self._seen), num_total=self.num_total)
