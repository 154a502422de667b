"""Pictures: with the base model or an adapter."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
from reverie.sampling.v1 import sampling_pb2 as pb
from reverie.sampling.v1.sampling_pb2_grpc import SamplingServiceStub

from reverie_client.calls import CallPolicy, call, stream
from reverie_client.transfer import Download, Transfers

OnSamplingProgress = Callable[[pb.SamplingProgress], None]


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
        self, request: pb.SampleRequest, *, on_progress: OnSamplingProgress | None = None
    ) -> tuple[pb.SampledImage, ...]:
        """Draw and return the pictures, in order; `on_progress` sees every sampling step."""
        images: list[pb.SampledImage] = []
        async for response in self.sample(request):
            if response.HasField("image"):
                images.append(response.image)
            elif on_progress is not None:
                on_progress(response.progress)
        return tuple(sorted(images, key=lambda image: image.image_index))

    async def save(self, images: tuple[pb.SampledImage, ...], paths: tuple[Path, ...]) -> None:
        """Download pictures to files. Raises TransferError, IntegrityError."""
        downloads = [
            Download(url=image.download_url, path=path, size_bytes=image.image.size_bytes, sha256=image.image.sha256)
            for image, path in zip(images, paths, strict=True)
        ]
        async with Transfers() as transfers:
            await transfers.download(downloads)

    async def describe(self) -> pb.DescribeSamplerResponse:
        """Return which model the server holds and which adapters are loaded."""
        return await call(self._stub.DescribeSampler, pb.DescribeSamplerRequest(), self._policy)
