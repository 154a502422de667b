"""From an order to pictures: what the store has is not drawn again, what is drawn is put there.

A picture is named by the whole order and by everything else that it depends on. Its latent is stored before it is
decoded, so that a VAE that is away costs no drawing.
"""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToJson, Parse
from reverie.common.v1.common_pb2 import ObjectRef, TensorRef
from reverie.vae.v1 import vae_pb2
from reverie_common.errors import DataLossError, ObjectNotFoundError, ResourceExhaustedError
from reverie_common.rpc.channel import repeat_while_unavailable
from reverie_common.storage import (
    JSON_MEDIA_TYPE,
    ObjectStore,
    RawTensor,
    get_object,
    put_tensor,
    tensor_ref_if_present,
)
from reverie_common.storage.keys import content_digest, reference_key, sample_key

from reverie_sampler.engine import Drawing, SamplerEngine
from reverie_sampler.metrics import ADAPTERS, DRAW_SECONDS, PICTURES, STEP_SECONDS, WAITING
from reverie_sampler.requests import SampleOrder
from reverie_sampler.texts import Texts

if TYPE_CHECKING:
    from reverie.vae.v1.vae_pb2_grpc import VaeServiceAsyncStub

LATENTS_NAME = "latents"
DESCRIBE_TIMEOUT_SECONDS = 10.0
DECODE_TIMEOUT_SECONDS = 300.0
MAX_ADAPTER_BYTES = 4 * 1024**3


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Sampling steps done, of all that this order takes."""

    step: int
    num_steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A finished picture."""

    index: int
    image: ObjectRef
    seed: int


class Pictures:
    """Draws orders one after the other. Belongs to one event loop."""

    def __init__(
        self,
        *,
        engine: SamplerEngine,
        store: ObjectStore,
        texts: Texts,
        vae: "VaeServiceAsyncStub",
        max_waiting: int,
        patience_seconds: float,
    ) -> None:
        """Draw with an engine, in a thread of its own."""
        self._engine = engine
        self._store = store
        self._texts = texts
        self._vae = vae
        self._max_waiting = max_waiting
        self._patience_seconds = patience_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampler")
        self._turn = asyncio.Lock()
        self._num_waiting = 0

    @property
    def engine(self) -> SamplerEngine:
        """What draws."""
        return self._engine

    def close(self) -> None:
        """Let the running step finish, forget the rest. Safe to repeat."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def draw(self, order: SampleOrder) -> AsyncGenerator[Progress | Picture, None]:
        """Yield progress, and the pictures in order. Safe to repeat: what is done is not done again.

        Raises:
            ResourceExhaustedError: too many orders wait already.
            UnavailableError: an encoder, the VAE or the store is away.
            NotFoundError, InvalidArgumentError: the adapter is not in the store, or does not fit.
        """
        surroundings = await self._surroundings()
        keys = [_keys(order, index, surroundings) for index in range(order.num_images)]
        stored = await asyncio.gather(*(asyncio.to_thread(self._stored_picture, key) for key, _ in keys))
        plan = _Steps(order.num_inference_steps * sum(picture is None for picture in stored))
        for index, ((key, latents_key), image) in enumerate(zip(keys, stored, strict=True)):
            if image is None:
                # Closed with this generator: a caller that leaves frees the engine at once.
                async with aclosing(self._draw_latents(order, index, latents_key, plan)) as steps:
                    async for progress in steps:
                        yield progress
                image = await self._decode(key, latents_key)
            PICTURES.labels("drawn" if stored[index] is None else "stored").inc()
            yield Picture(index=index, image=image, seed=order.seed + index)

    async def _surroundings(self) -> Mapping[str, Any]:
        """What a picture depends on besides the order. Asked every time: services are replaced while we run."""
        encoders, vae = await asyncio.gather(self._texts.fingerprints(), self._describe_vae())
        return {"transformer": self._engine.facts.drawing_fingerprint, "encoders": encoders, "vae": vae.fingerprint}

    async def _describe_vae(self) -> vae_pb2.DescribeVaeResponse:
        return await repeat_while_unavailable(
            lambda: self._vae.DescribeVae(vae_pb2.DescribeVaeRequest(), timeout=DESCRIBE_TIMEOUT_SECONDS),
            limit_seconds=self._patience_seconds,
        )

    def _stored_picture(self, key: str) -> ObjectRef | None:
        try:
            ref = Parse(self._store.get(reference_key(key)), ObjectRef())
        except ObjectNotFoundError:
            return None
        # The reference may outlive the picture.
        return ref if self._store.head(self._store.key_of(ref.uri)) is not None else None

    async def _draw_latents(
        self, order: SampleOrder, index: int, key: str, plan: "_Steps"
    ) -> AsyncGenerator[Progress, None]:
        async with self._my_turn():
            # Somebody may have drawn it while we waited.
            if await asyncio.to_thread(tensor_ref_if_present, self._store, key) is not None:
                plan.skip(order.num_inference_steps)
                return
            drawing = await self._drawing(order, index)
            steps = _StepFeed()
            running = asyncio.get_running_loop().run_in_executor(self._thread, self._run, order, drawing, steps)
            running.add_done_callback(steps.close)
            try:
                async for _ in steps:
                    yield plan.advance()
                latents = await running
            finally:
                steps.stop()
            await asyncio.to_thread(put_tensor, self._store, key, LATENTS_NAME, latents, compressed=False)

    @asynccontextmanager
    async def _my_turn(self) -> AsyncIterator[None]:
        if self._num_waiting >= self._max_waiting:
            raise ResourceExhaustedError(
                f"{self._num_waiting} requests wait already, the limit is {self._max_waiting}; try again later",
                reason="QUEUE_FULL",
                metadata={"num_waiting": str(self._num_waiting), "max_waiting": str(self._max_waiting)},
                retry_after_seconds=5.0,
            )
        self._num_waiting += 1
        WAITING.set(self._num_waiting)
        try:
            await self._turn.acquire()
        finally:
            self._num_waiting -= 1
            WAITING.set(self._num_waiting)
        try:
            yield
        finally:
            self._turn.release()

    async def _drawing(self, order: SampleOrder, index: int) -> Drawing:
        positive = await self._texts.embed(order.prompt)
        negative = await self._texts.embed(order.negative_prompt) if order.is_guided else None
        return Drawing(
            width=order.width,
            height=order.height,
            num_inference_steps=order.num_inference_steps,
            guidance_scale=order.guidance_scale,
            seed=order.seed + index,
            shift=order.shift,
            positive=positive,
            negative=negative,
            adapter_sha256=None if order.adapter is None else order.adapter.sha256,
            adapter_strength=order.adapter_strength,
        )

    def _run(self, order: SampleOrder, drawing: Drawing, steps: "_StepFeed") -> RawTensor:
        """The part that blocks, in the engine's thread."""
        if order.adapter is not None and order.adapter.sha256 not in self._engine.adapter_sha256s:
            body = get_object(self._store, order.adapter, max_size_bytes=MAX_ADAPTER_BYTES)
            self._engine.add_adapter(order.adapter.sha256, body)
            ADAPTERS.set(len(self._engine.adapter_sha256s))
        with DRAW_SECONDS.time():
            return self._engine.draw(drawing, on_step=steps.push, should_stop=lambda: steps.is_stopped)

    async def _decode(self, key: str, latents_key: str) -> ObjectRef:
        latents = await asyncio.to_thread(tensor_ref_if_present, self._store, latents_key)
        if latents is None:
            raise DataLossError(f"latents {latents_key} vanished from the store before they were decoded; try again")
        image = await self._ask_vae(latents)
        body = MessageToJson(image, indent=None).encode()
        await asyncio.to_thread(self._store.replace, reference_key(key), body, media_type=JSON_MEDIA_TYPE)
        return image

    async def _ask_vae(self, latents: TensorRef) -> ObjectRef:
        request = vae_pb2.DecodeLatentsRequest(latents=latents)
        response = await repeat_while_unavailable(
            lambda: self._vae.DecodeLatents(request, timeout=DECODE_TIMEOUT_SECONDS),
            limit_seconds=self._patience_seconds,
        )
        return response.images[0]


def _keys(order: SampleOrder, index: int, surroundings: Mapping[str, Any]) -> tuple[str, str]:
    """Keys of one picture and of its latent."""
    record = {
        "prompt": order.prompt,
        "negative_prompt": order.negative_prompt if order.is_guided else None,
        "width": order.width,
        "height": order.height,
        "num_inference_steps": order.num_inference_steps,
        "guidance_scale": order.guidance_scale if order.is_guided else None,
        "seed": order.seed + index,
        "shift": order.shift,
        "adapter": None if order.adapter is None else order.adapter.sha256,
        "adapter_strength": None if order.adapter is None else order.adapter_strength,
        "transformer": surroundings["transformer"],
        "encoders": surroundings["encoders"],
    }
    picture = content_digest({"kind": "picture", **record, "vae": surroundings["vae"]})
    return sample_key(picture), sample_key(content_digest({"kind": "latents", **record}))


class _Steps:
    """Counts the steps of an order over all its pictures."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._step = 0

    def advance(self) -> Progress:
        self._step += 1
        return Progress(step=self._step, num_steps=self._num_steps)

    def skip(self, num_steps: int) -> None:
        self._num_steps -= num_steps


class _StepFeed:
    """Brings steps from the engine's thread to the event loop, and the wish to stop the other way."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[bool] = asyncio.Queue()
        self._stopped = threading.Event()
        self._last = time.monotonic()

    @property
    def is_stopped(self) -> bool:
        return self._stopped.is_set()

    def stop(self) -> None:
        self._stopped.set()

    def push(self, step: int, num_steps: int) -> None:
        """A step is done; called by the engine's thread."""
        del step, num_steps
        now = time.monotonic()
        STEP_SECONDS.observe(now - self._last)
        self._last = now
        self._loop.call_soon_threadsafe(self._queue.put_nowait, True)

    def close(self, running: asyncio.Future[RawTensor]) -> None:
        """No more steps; called by the event loop."""
        if not running.cancelled():
            running.exception()  # seen, even where the caller has left before it was raised
        self._queue.put_nowait(False)

    async def __aiter__(self) -> AsyncIterator[None]:
        while await self._queue.get():
            yield
