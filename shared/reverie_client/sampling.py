"""Pictures: with the base model or an adapter."""

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import grpc
from reverie.sampling.v1 import sampling_pb2 as pb
from reverie.sampling.v1.sampling_pb2_grpc import SamplingServiceStub

from reverie_client.calls import CallPolicy, call, stream
from reverie_client.transfer import Download, Transfers

OnSamplingProgress = Callable[[pb.SamplingProgress], None]
OnSamplingPreview = Callable[[pb.SamplingPreview], None]
OnSamplingNotice = Callable[[pb.SamplingNotice], None]


class Sampling:
    """`reverie.sampling`: every RPC of SamplingService."""

    def __init__(self, channel: grpc.aio.Channel, policy: CallPolicy) -> None:
        """Call the SamplingService behind `channel`."""
        self._stub = SamplingServiceStub(channel)
        self._policy = policy

    async def sample(self, request: pb.SampleRequest) -> AsyncIterator[pb.SampleResponse]:
        """Yield progress, then one response for each picture. The same request draws the same pictures."""
        async for response in stream(self._stub.Sample, request, self._policy):
            yield response

    async def draw(
        self,
        request: pb.SampleRequest,
        *,
        on_progress: OnSamplingProgress | None = None,
        on_preview: OnSamplingPreview | None = None,
        on_notice: OnSamplingNotice | None = None,
    ) -> tuple[pb.SampledImage, ...]:
        """Draw and return the pictures, in order.

        Args:
            request: what to draw.
            on_progress: sees every sampling step.
            on_preview: sees the previews, where the request asks for some.
            on_notice: is told what is not as it was asked for.
        """
        images: list[pb.SampledImage] = []
        async for response in self.sample(request):
            if response.HasField("image"):
                images.append(response.image)
            elif response.HasField("preview") and on_preview is not None:
                on_preview(response.preview)
            elif response.HasField("notice") and on_notice is not None:
                on_notice(response.notice)
            elif response.HasField("progress") and on_progress is not None:
                on_progress(response.progress)
        return tuple(sorted(images, key=lambda image: image.image_index))

    async def save(self, images: Sequence[pb.SampledImage | pb.SamplingPreview], paths: Sequence[Path]) -> None:
        """Download pictures or previews to files. Raises TransferError, IntegrityError."""
        downloads = [
            Download(url=image.download_url, path=path, size_bytes=image.image.size_bytes, sha256=image.image.sha256)
            for image, path in zip(images, paths, strict=True)
        ]
        async with Transfers() as transfers:
            await transfers.download(downloads)

    async def describe(self) -> pb.DescribeSamplerResponse:
        """Return which model the server holds and which adapters are loaded."""
        return await call(self._stub.DescribeSampler, pb.DescribeSamplerRequest(), self._policy)
