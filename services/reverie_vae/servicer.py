"""VaeService over gRPC: translates messages and streams answers as they are ready. The checks are in requests.py."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from reverie.vae.v1 import vae_pb2
from reverie.vae.v1.vae_pb2_grpc import VaeServiceServicer
from reverie_common.concurrency import as_ready
from reverie_common.errors import UnavailableError

from reverie_vae.files import ImageFile
from reverie_vae.images import ResizeCrop
from reverie_vae.inspections import Inspections
from reverie_vae.latents import Latents
from reverie_vae.masks import Masks
from reverie_vae.metrics import REJECTIONS
from reverie_vae.previews import Previews
from reverie_vae.rejections import ImageRejectedError
from reverie_vae.requests import KeyOf, Locate, check_latents, checked_images, checked_plans


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeDomain:
    """What the servicer translates to."""

    inspections: Inspections
    latents: Latents
    previews: Previews
    masks: Masks
    key_of: KeyOf
    locate: Locate


class VaeServicer(VaeServiceServicer):
    """Serves one VaeDomain, once there is one."""

    def __init__(self, *, max_in_flight: int) -> None:
        self._max_in_flight = max_in_flight
        self._loaded: VaeDomain | None = None

    def serve(self, domain: VaeDomain) -> None:
        """Answer from now on; before this every call is UNAVAILABLE."""
        self._loaded = domain

    async def InspectImages(  # noqa: N802 - gRPC's name
        self, request: vae_pb2.InspectImagesRequest, context: Any
    ) -> AsyncIterator[vae_pb2.InspectImagesResponse]:
        """See the proto."""
        del context
        domain = self._domain()
        files = checked_images(request, domain.locate)

        async def inspect(numbered: tuple[int, ImageFile]) -> vae_pb2.InspectImagesResponse:
            index, file = numbered
            try:
                found = await domain.inspections.inspect(file)
            except ImageRejectedError as error:
                return vae_pb2.InspectImagesResponse(image_index=index, rejection=_rejection(error))
            image = vae_pb2.ImageDescription(width=found.width, height=found.height, format=found.format)
            return vae_pb2.InspectImagesResponse(image_index=index, image=image)

        async for response in as_ready(enumerate(files), inspect, max_in_flight=self._max_in_flight):
            yield response

    async def EncodeImages(  # noqa: N802 - gRPC's name
        self, request: vae_pb2.EncodeImagesRequest, context: Any
    ) -> AsyncIterator[vae_pb2.EncodeImagesResponse]:
        """See the proto."""
        del context
        domain = self._domain()
        plans = checked_plans(request.images, domain.locate, downsampling=domain.latents.facts.downsampling)

        async def encode(numbered: tuple[int, tuple[ImageFile, ResizeCrop]]) -> vae_pb2.EncodeImagesResponse:
            index, (file, plan) = numbered
            try:
                made = await domain.latents.encode(file, plan)
            except ImageRejectedError as error:
                return vae_pb2.EncodeImagesResponse(image_index=index, rejection=_rejection(error))
            moments = vae_pb2.LatentMoments(tensor=made.ref)
            return vae_pb2.EncodeImagesResponse(image_index=index, moments=moments, cached=made.cached)

        async for response in as_ready(enumerate(plans), encode, max_in_flight=self._max_in_flight):
            yield response

    async def EncodeMasks(  # noqa: N802 - gRPC's name
        self, request: vae_pb2.EncodeMasksRequest, context: Any
    ) -> AsyncIterator[vae_pb2.EncodeMasksResponse]:
        """See the proto."""
        del context
        domain = self._domain()
        downsampling = domain.latents.facts.downsampling
        plans = checked_plans(request.masks, domain.locate, field="masks", downsampling=downsampling)

        async def encode(numbered: tuple[int, tuple[ImageFile, ResizeCrop]]) -> vae_pb2.EncodeMasksResponse:
            index, (file, plan) = numbered
            try:
                made = await domain.masks.encode(file, plan)
            except ImageRejectedError as error:
                return vae_pb2.EncodeMasksResponse(mask_index=index, rejection=_rejection(error))
            return vae_pb2.EncodeMasksResponse(mask_index=index, mask=made.ref, cached=made.cached)

        async for response in as_ready(enumerate(plans), encode, max_in_flight=self._max_in_flight):
            yield response

    async def ReleaseMemory(  # noqa: N802 - gRPC's name
        self, request: vae_pb2.ReleaseMemoryRequest, context: Any
    ) -> vae_pb2.ReleaseMemoryResponse:
        """See the proto."""
        del request, context
        return vae_pb2.ReleaseMemoryResponse(released=await self._domain().latents.release())

    async def DecodeLatents(  # noqa: N802 - gRPC's name
        self, request: vae_pb2.DecodeLatentsRequest, context: Any
    ) -> vae_pb2.DecodeLatentsResponse:
        """See the proto."""
        del context
        domain = self._domain()
        check_latents(request.latents, domain.key_of, domain.latents.facts)
        return vae_pb2.DecodeLatentsResponse(images=await domain.latents.decode(request.latents))

    async def PreviewLatents(  # noqa: N802 - gRPC's name
        self, request: vae_pb2.PreviewLatentsRequest, context: Any
    ) -> vae_pb2.PreviewLatentsResponse:
        """See the proto."""
        del context
        domain = self._domain()
        check_latents(request.latents, domain.key_of, domain.latents.facts)
        return vae_pb2.PreviewLatentsResponse(images=await domain.previews.decode(request.latents))

    async def DescribeVae(  # noqa: N802 - gRPC's name
        self, request: vae_pb2.DescribeVaeRequest, context: Any
    ) -> vae_pb2.DescribeVaeResponse:
        """See the proto."""
        del request, context
        domain = self._domain()
        latents = domain.latents
        return vae_pb2.DescribeVaeResponse(
            fingerprint=latents.facts.fingerprint,
            device=latents.facts.device,
            dtype=latents.facts.dtype,
            max_pixels=latents.max_pixels,
            scaling_factor=latents.facts.scaling_factor,
            shift_factor=latents.facts.shift_factor,
            preview_fingerprint=domain.previews.fingerprint,
            preview_decoder=domain.previews.location,
        )

    def _domain(self) -> VaeDomain:
        if self._loaded is None:
            raise UnavailableError("the VAE is loading; try again", reason="LOADING", retry_after_seconds=2.0)
        return self._loaded


def _rejection(error: ImageRejectedError) -> vae_pb2.ImageRejection:
    REJECTIONS.labels(error.reason.value).inc()
    reason = vae_pb2.RejectionReason.Value(f"REJECTION_REASON_{error.reason.value}")
    return vae_pb2.ImageRejection(reason=reason, message=error.message)
