"""From an order to pictures: what the store has is not drawn again, what is drawn is put there.

A picture is named by the whole order and by everything else that it depends on. Its latent is stored before it is
decoded, so that a VAE that is away costs no drawing.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToJson, Parse
from reverie.common.v1.common_pb2 import ObjectRef, TensorRef
from reverie.vae.v1 import vae_pb2
from reverie_common.errors import (
    DataLossError,
    FailedPreconditionError,
    ObjectNotFoundError,
    ResourceExhaustedError,
    ReverieError,
)
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
from reverie_sampler.feed import DrawingFeed
from reverie_sampler.metrics import ADAPTERS, DRAW_SECONDS, PICTURES, WAITING
from reverie_sampler.previews import Preview, PreviewMaker
from reverie_sampler.requests import SampleOrder
from reverie_sampler.scores import Scores
from reverie_sampler.texts import Texts

if TYPE_CHECKING:
    from reverie.vae.v1.vae_pb2_grpc import VaeServiceAsyncStub

logger = logging.getLogger(__name__)

LATENTS_NAME = "latents"
DESCRIBE_TIMEOUT_SECONDS = 10.0
DECODE_TIMEOUT_SECONDS = 300.0
MAX_ADAPTER_BYTES = 4 * 1024**3
PREVIEW_PATIENCE_SECONDS = 1.0
"""How long a finished picture waits for a preview that is under way."""


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
    clip_score: float | None = None
    """None where it was not asked for, or could not be computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Notice:
    """Something that is not as it was asked for; the drawing goes on."""

    reason: str
    message: str


Answer = Progress | Preview | Notice | Picture


class Pictures:
    """Draws orders one after the other. Belongs to one event loop."""

    def __init__(
        self,
        *,
        engine: SamplerEngine,
        store: ObjectStore,
        texts: Texts,
        vae: "VaeServiceAsyncStub",
        scores: Scores,
        max_waiting: int,
        patience_seconds: float,
    ) -> None:
        """Draw with an engine, in a thread of its own."""
        self._engine = engine
        self._store = store
        self._texts = texts
        self._vae = vae
        self._scores = scores
        self._max_waiting = max_waiting
        self._patience_seconds = patience_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampler")
        self._turn = asyncio.Lock()
        self._num_waiting = 0

    @property
    def engine(self) -> SamplerEngine:
        """What draws."""
        return self._engine

    @property
    def clip_model(self) -> str:
        """Where the CLIP model of scores comes from; empty where there is none."""
        return self._scores.location

    async def has_previews(self) -> bool:
        """Whether the VAE service holds a tiny decoder; no as well where it does not answer."""
        try:
            return bool((await self._describe_vae(patience_seconds=0.0)).preview_decoder)
        except ReverieError as error:
            logger.info("the VAE is not described: %s", error.message)
            return False

    def close(self) -> None:
        """Let the running step finish, forget the rest. Safe to repeat."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._engine.close()
        self._scores.close()

    async def draw(self, order: SampleOrder) -> AsyncGenerator[Answer, None]:
        """Yield progress, previews, notices, and the pictures in order. Safe to repeat: what is done is not done again.

        Raises:
            ResourceExhaustedError: too many orders wait already.
            UnavailableError: an encoder, the VAE or the store is away.
            FailedPreconditionError: scores are asked for and there is no CLIP model.
            NotFoundError, InvalidArgumentError: the adapter is not in the store, or does not fit.
        """
        self._require_clip_model(order)
        surroundings = await self._surroundings()
        keys = [_keys(order, index, surroundings) for index in range(order.num_images)]
        stored = await asyncio.gather(*(asyncio.to_thread(self._stored_picture, key) for key, _ in keys))
        plan = _Steps(order.num_inference_steps * sum(picture is None for picture in stored))
        notices = _Notices()
        for index, image in enumerate(stored):
            if image is None:
                # Closed with this generator: a caller that leaves frees the engine at once.
                answers = self._draw_picture(order, index, keys[index], plan, notices)
                async with aclosing(answers):
                    async for answer in answers:
                        if isinstance(answer, ObjectRef):
                            image = answer
                            break
                        yield answer
                    else:
                        raise AssertionError("a drawing ends with its picture")
            PICTURES.labels("drawn" if stored[index] is None else "stored").inc()
            score = await self._score(order, image, notices)
            for notice in notices.take():
                yield notice
            yield Picture(index=index, image=image, seed=order.seed + index, clip_score=score)

    def _require_clip_model(self, order: SampleOrder) -> None:
        if order.clip_score and not self._scores.location:
            raise FailedPreconditionError(
                "clip_score: this sampler has no CLIP model; start it with --clip-model, or leave clip_score out",
                reason="NO_CLIP_MODEL",
            )

    async def _score(self, order: SampleOrder, image: ObjectRef, notices: "_Notices") -> float | None:
        if not order.clip_score:
            return None
        try:
            return await self._scores.score(image, order.prompt)
        except (ReverieError, OSError, ValueError) as error:
            # The picture is worth more than its score.
            logger.warning("a picture was not scored: %s", error)
            notices.add("CLIP_SCORE_LOST", f"pictures are not scored: {error}")
            return None

    async def _surroundings(self) -> Mapping[str, Any]:
        """What a picture depends on besides the order. Asked every time: services are replaced while we run."""
        encoders, vae = await asyncio.gather(self._texts.fingerprints(), self._describe_vae())
        return {"transformer": self._engine.facts.drawing_fingerprint, "encoders": encoders, "vae": vae.fingerprint}

    async def _describe_vae(self, patience_seconds: float | None = None) -> vae_pb2.DescribeVaeResponse:
        return await repeat_while_unavailable(
            lambda: self._vae.DescribeVae(vae_pb2.DescribeVaeRequest(), timeout=DESCRIBE_TIMEOUT_SECONDS),
            limit_seconds=self._patience_seconds if patience_seconds is None else patience_seconds,
        )

    def _stored_picture(self, key: str) -> ObjectRef | None:
        try:
            ref = Parse(self._store.get(reference_key(key)), ObjectRef())
        except ObjectNotFoundError:
            return None
        # The reference may outlive the picture.
        return ref if self._store.head(self._store.key_of(ref.uri)) is not None else None

    async def _draw_picture(
        self, order: SampleOrder, index: int, keys: tuple[str, str], plan: "_Steps", notices: "_Notices"
    ) -> AsyncGenerator[Progress | Preview | ObjectRef, None]:
        """Draw one picture with its previews; the last answer is the picture."""
        key, latents_key = keys
        previews = PreviewMaker(self._vae, self._store, index=index, latents_key=latents_key)
        try:
            async with aclosing(self._draw_latents(order, index, latents_key, plan, previews)) as steps:
                async for progress in steps:
                    yield progress
                    for preview in previews.take():
                        yield preview
            # The last previews are made while the VAE decodes the picture.
            image = await self._decode(key, latents_key)
            for preview in await previews.finish(PREVIEW_PATIENCE_SECONDS):
                yield preview
        finally:
            await previews.finish(0.0)
        if previews.problem is not None:
            notices.add("PREVIEWS_LOST", f"no more previews of this picture: {previews.problem}")
        if order.compile and self._engine.compile_problem is not None:
            notices.add("NOT_COMPILED", f"drawn without compiling: {self._engine.compile_problem}")
        yield image

    async def _draw_latents(
        self, order: SampleOrder, index: int, key: str, plan: "_Steps", previews: PreviewMaker
    ) -> AsyncGenerator[Progress, None]:
        async with self._my_turn():
            # Somebody may have drawn it while we waited.
            if await asyncio.to_thread(tensor_ref_if_present, self._store, key) is not None:
                plan.skip(order.num_inference_steps)
                return
            drawing = await self._drawing(order, index)
            feed = DrawingFeed()
            running = asyncio.get_running_loop().run_in_executor(self._thread, self._run, order, drawing, feed)
            running.add_done_callback(feed.close)
            try:
                async for preview in feed:
                    if preview is None:
                        yield plan.advance()
                    else:
                        previews.offer(preview)
                latents = await running
            finally:
                feed.stop()
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
            guidance_rescale=order.guidance_rescale,
            scheduler=order.scheduler,
            preview_steps=order.preview_steps,
            compile=order.compile,
        )

    def _run(self, order: SampleOrder, drawing: Drawing, feed: DrawingFeed) -> RawTensor:
        """The part that blocks, in the engine's thread."""
        if order.adapter is not None and order.adapter.sha256 not in self._engine.adapter_sha256s:
            body = get_object(self._store, order.adapter, max_size_bytes=MAX_ADAPTER_BYTES)
            self._engine.add_adapter(order.adapter.sha256, body)
            ADAPTERS.set(len(self._engine.adapter_sha256s))
        with DRAW_SECONDS.time():
            return self._engine.draw(drawing, feed.hooks)

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
        "guidance_rescale": order.guidance_rescale if order.is_guided else None,
        "seed": order.seed + index,
        "shift": order.shift,
        "scheduler": order.scheduler,
        # Rounded in another order.
        "compile": order.compile,
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


class _Notices:
    """Tells each kind of notice once for each order."""

    def __init__(self) -> None:
        self._waiting: list[Notice] = []
        self._told: set[str] = set()

    def add(self, reason: str, message: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            self._waiting.append(Notice(reason=reason, message=message))

    def take(self) -> list[Notice]:
        taken, self._waiting = self._waiting, []
        return taken
