"""The VAE, for those who want latents or pictures without a job."""

from collections.abc import AsyncIterator, Sequence

import grpc
from reverie.common.v1.common_pb2 import ObjectRef, TensorRef
from reverie.vae.v1 import vae_pb2 as pb
from reverie.vae.v1.vae_pb2_grpc import VaeServiceStub

from reverie_client.calls import CallPolicy, call, stream


class Vae:
    """`reverie.vae`: every RPC of VaeService."""

    def __init__(self, channel: grpc.aio.Channel, policy: CallPolicy) -> None:
        """Call the VaeService behind `channel`."""
        self._stub = VaeServiceStub(channel)
        self._policy = policy

    async def inspect(self, images: Sequence[ObjectRef]) -> AsyncIterator[pb.InspectImagesResponse]:
        """Yield the size of each image or the reason why it cannot be used, in any order."""
        request = pb.InspectImagesRequest(images=images)
        async for response in stream(self._stub.InspectImages, request, self._policy):
            yield response

    async def encode(self, plans: Sequence[pb.ImagePlan]) -> AsyncIterator[pb.EncodeImagesResponse]:
        """Yield the latents of each image or the reason why it cannot be used, in any order."""
        async for response in stream(self._stub.EncodeImages, pb.EncodeImagesRequest(images=plans), self._policy):
            yield response

    async def encode_masks(self, plans: Sequence[pb.ImagePlan]) -> AsyncIterator[pb.EncodeMasksResponse]:
        """Yield each mask at latent size or the reason why it cannot be used, in any order."""
        async for response in stream(self._stub.EncodeMasks, pb.EncodeMasksRequest(masks=plans), self._policy):
            yield response

    async def decode(self, latents: TensorRef) -> tuple[ObjectRef, ...]:
        """Return one PNG in the store for each of the scaled latents [N, 16, height/8, width/8]."""
        answer = await call(self._stub.DecodeLatents, pb.DecodeLatentsRequest(latents=latents), self._policy)
        return tuple(answer.images)

    async def preview(self, latents: TensorRef) -> tuple[ObjectRef, ...]:
        """Return one small PNG in the store for each of the scaled latents [N, 16, height/8, width/8], made quickly."""
        answer = await call(self._stub.PreviewLatents, pb.PreviewLatentsRequest(latents=latents), self._policy)
        return tuple(answer.images)

    async def describe(self) -> pb.DescribeVaeResponse:
        """Return what the server holds."""
        return await call(self._stub.DescribeVae, pb.DescribeVaeRequest(), self._policy)

    async def release_memory(self) -> bool:
        """Have the idle VAE wait in host memory until its next request; returns whether it does now."""
        answer = await call(self._stub.ReleaseMemory, pb.ReleaseMemoryRequest(), self._policy)
        return answer.released
