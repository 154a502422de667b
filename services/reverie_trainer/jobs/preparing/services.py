"""The encoder and VAE services as preparation sees them: typed calls that raise ReverieErrors."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass

import grpc.aio
from reverie.common.v1 import common_pb2
from reverie.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from reverie.vae.v1 import vae_pb2, vae_pb2_grpc
from reverie_common.rpc.channel import connect, translated

from reverie_trainer.jobs.preparing.geometry import ImagePlan

ENCODER_NAMES: Mapping[int, str] = {
    encoder_pb2.ENCODER_CLIP_L: "clip_l",
    encoder_pb2.ENCODER_CLIP_G: "clip_g",
    encoder_pb2.ENCODER_T5: "t5",
    encoder_pb2.ENCODER_LLAMA: "llama",
}

# Several seconds of work for each of the items of a call on a slow CPU, with the queue before it.
_CALL_SECONDS = 900.0
_DESCRIBE_SECONDS = 20.0
# The first copy of 27 GB into pinned memory, with room.
_RELEASE_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedImage:
    """An image file and its way into its bucket."""

    image: common_pb2.ObjectRef
    plan: ImagePlan


class EncoderClient:
    """One address where some of the text encoders are."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel: grpc.aio.Channel = connect(address)
        self._stub: encoder_pb2_grpc.EncoderServiceAsyncStub = encoder_pb2_grpc.EncoderServiceStub(self._channel)

    async def describe(self, timeout_seconds: float = _DESCRIBE_SECONDS) -> list[encoder_pb2.EncoderDescription]:
        """Return what this process holds."""
        with translated():
            response = await self._stub.DescribeEncoders(encoder_pb2.DescribeEncodersRequest(), timeout=timeout_seconds)
        return list(response.encoders)

    async def release(self) -> bool:
        """Move idle encoders to host memory; returns whether all are there."""
        with translated():
            response = await self._stub.ReleaseMemory(encoder_pb2.ReleaseMemoryRequest(), timeout=_RELEASE_SECONDS)
        return response.released

    async def encode(
        self, prompts: Sequence[str], encoders: Sequence[encoder_pb2.Encoder.ValueType], storage: str
    ) -> AsyncGenerator[tuple[int, encoder_pb2.EncodePromptsResponse], None]:
        """Yield (index, embeddings) of prompts, in any order; `storage` as in the job's embedding_storage."""
        request = encoder_pb2.EncodePromptsRequest(prompts=prompts, encoders=encoders, storage=storage)
        with translated():
            async for response in self._stub.EncodePrompts(request, timeout=_CALL_SECONDS):
                yield response.prompt_index, response

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


class VaeClient:
    """The address of the VAE."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel: grpc.aio.Channel = connect(address)
        self._stub: vae_pb2_grpc.VaeServiceAsyncStub = vae_pb2_grpc.VaeServiceStub(self._channel)

    async def describe(self, timeout_seconds: float = _DESCRIBE_SECONDS) -> vae_pb2.DescribeVaeResponse:
        """Return what this process holds."""
        with translated():
            return await self._stub.DescribeVae(vae_pb2.DescribeVaeRequest(), timeout=timeout_seconds)

    async def release(self) -> bool:
        """Move the VAE to host memory if it is idle; returns whether it is there."""
        with translated():
            response = await self._stub.ReleaseMemory(vae_pb2.ReleaseMemoryRequest(), timeout=_RELEASE_SECONDS)
        return response.released

    async def inspect(
        self, images: Sequence[common_pb2.ObjectRef]
    ) -> AsyncGenerator[tuple[int, vae_pb2.InspectImagesResponse], None]:
        """Yield (index, size or rejection) of images, in any order."""
        request = vae_pb2.InspectImagesRequest(images=images)
        with translated():
            async for response in self._stub.InspectImages(request, timeout=_CALL_SECONDS):
                yield response.image_index, response

    async def encode(
        self, images: Sequence[PlannedImage]
    ) -> AsyncGenerator[tuple[int, vae_pb2.EncodeImagesResponse], None]:
        """Yield (index, latents or rejection) of images, in any order."""
        request = vae_pb2.EncodeImagesRequest(images=[_plan_message(image) for image in images])
        with translated():
            async for response in self._stub.EncodeImages(request, timeout=_CALL_SECONDS):
                yield response.image_index, response

    async def encode_masks(
        self, masks: Sequence[PlannedImage]
    ) -> AsyncGenerator[tuple[int, vae_pb2.EncodeMasksResponse], None]:
        """Yield (index, mask or rejection) of masks, in any order."""
        request = vae_pb2.EncodeMasksRequest(masks=[_plan_message(mask) for mask in masks])
        with translated():
            async for response in self._stub.EncodeMasks(request, timeout=_CALL_SECONDS):
                yield response.mask_index, response

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Services:
    """Everything that preparation asks."""

    encoders: tuple[EncoderClient, ...]
    vae: VaeClient

    async def close(self) -> None:
        """Close every channel."""
        await self.vae.close()
        for client in self.encoders:
            await client.close()


def _plan_message(image: PlannedImage) -> vae_pb2.ImagePlan:
    plan = image.plan
    return vae_pb2.ImagePlan(
        image=image.image,
        resize_width=plan.resize_width,
        resize_height=plan.resize_height,
        crop_left=plan.crop_left,
        crop_top=plan.crop_top,
        width=plan.width,
        height=plan.height,
    )
