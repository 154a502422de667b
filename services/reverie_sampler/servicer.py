"""SamplingService over gRPC: translates messages and streams answers. The checks are in requests.py."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from datetime import timedelta
from typing import Any

from reverie.sampling.v1 import sampling_pb2
from reverie.sampling.v1.sampling_pb2_grpc import SamplingServiceServicer
from reverie_common.errors import UnavailableError
from reverie_common.storage import ObjectStore

from reverie_sampler.pictures import Answer, Notice, Picture, Pictures, Progress
from reverie_sampler.previews import Preview
from reverie_sampler.requests import SampleOrder, SizeRule, checked_order

DOWNLOAD_EXPIRY = timedelta(hours=1)


class SamplerServicer(SamplingServiceServicer):
    """Serves one `Pictures`, once there is one."""

    def __init__(self, store: ObjectStore) -> None:
        """Nothing is served yet."""
        self._store = store
        self._loaded: Pictures | None = None

    def serve(self, pictures: Pictures) -> None:
        """Answer from now on; before this every call is UNAVAILABLE."""
        self._loaded = pictures

    async def Sample(  # noqa: N802 - gRPC's name
        self, request: sampling_pb2.SampleRequest, context: Any
    ) -> AsyncIterator[sampling_pb2.SampleResponse]:
        """See the proto."""
        del context
        pictures = self._pictures()
        facts = pictures.engine.facts
        rule = SizeRule(pixel_multiple=facts.pixel_multiple, max_pixels=facts.max_pixels)
        order = checked_order(request, rule, self._store.key_of)
        # A caller that leaves must end the drawing at once, not when the generator happens to be collected.
        async with aclosing(pictures.draw(order)) as answers:
            async for answer in answers:
                yield _to_proto(answer, order, self._download_url)

    async def DescribeSampler(  # noqa: N802 - gRPC's name
        self, request: sampling_pb2.DescribeSamplerRequest, context: Any
    ) -> sampling_pb2.DescribeSamplerResponse:
        """See the proto."""
        del request, context
        pictures = self._pictures()
        engine = pictures.engine
        return sampling_pb2.DescribeSamplerResponse(
            fingerprint=engine.facts.fingerprint,
            precision=engine.facts.precision,
            device=engine.facts.device,
            max_pixels=engine.facts.max_pixels,
            adapter_sha256s=engine.adapter_sha256s,
            clip_model=pictures.clip_model,
            has_previews=await pictures.has_previews(),
        )

    def _download_url(self, uri: str) -> str:
        return self._store.presign_get(self._store.key_of(uri), expires=DOWNLOAD_EXPIRY)

    def _pictures(self) -> Pictures:
        if self._loaded is None:
            raise UnavailableError("the transformer is loading; try again", reason="LOADING", retry_after_seconds=2.0)
        return self._loaded


def _to_proto(answer: Answer, order: SampleOrder, download_url: Callable[[str], str]) -> sampling_pb2.SampleResponse:
    if isinstance(answer, Picture):
        return sampling_pb2.SampleResponse(image=_image(answer, order, download_url))
    if isinstance(answer, Progress):
        progress = sampling_pb2.SamplingProgress(step=answer.step, num_steps=answer.num_steps)
        return sampling_pb2.SampleResponse(progress=progress)
    if isinstance(answer, Notice):
        notice = sampling_pb2.SamplingNotice(reason=answer.reason, message=answer.message)
        return sampling_pb2.SampleResponse(notice=notice)
    return sampling_pb2.SampleResponse(preview=_preview(answer, download_url))


def _image(answer: Picture, order: SampleOrder, download_url: Callable[[str], str]) -> sampling_pb2.SampledImage:
    return sampling_pb2.SampledImage(
        image_index=answer.index,
        image=answer.image,
        width=order.width,
        height=order.height,
        seed=answer.seed,
        download_url=download_url(answer.image.uri),
        clip_score=answer.clip_score,
    )


def _preview(answer: Preview, download_url: Callable[[str], str]) -> sampling_pb2.SamplingPreview:
    return sampling_pb2.SamplingPreview(
        image_index=answer.index,
        step=answer.step,
        num_steps=answer.num_steps,
        timestep=answer.timestep,
        image=answer.image,
        download_url=download_url(answer.image.uri),
    )
