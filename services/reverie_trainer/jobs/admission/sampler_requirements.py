"""What a job's pictures need of the sampler: a CLIP model for scores, a tiny decoder for previews."""

import logging

import grpc.aio
from reverie.sampling.v1 import sampling_pb2, sampling_pb2_grpc
from reverie_common.errors import FieldViolation, ReverieError
from reverie_common.rpc.channel import connect, translated

from reverie_trainer.jobs.spec import JobSpec

logger = logging.getLogger(__name__)

_DESCRIBE_SECONDS = 3.0


class SamplerRequirements:
    """Compares jobs with the sampler of this trainer. Belongs to one event loop."""

    def __init__(self, address: str) -> None:
        """Ask nothing yet; an empty address is no sampler."""
        self._address = address
        self._channel: grpc.aio.Channel | None = None

    async def check(self, spec: JobSpec) -> list[FieldViolation]:
        """Return what the sampler cannot do for a job; nothing where it does not answer."""
        if spec.validation is None or not spec.validation.clip_score:
            return []
        sampler = await self._describe()
        if sampler is None or sampler.clip_model:
            return []
        description = (
            f"the sampler at {self._address} has no CLIP model; start it with --clip-model (a directory, or a Hub id "
            "such as openai/clip-vit-large-patch14), or leave clip_score out"
        )
        return [FieldViolation(field="validation.clip_score", description=description)]

    async def notices(self, spec: JobSpec) -> list[tuple[str, str]]:
        """Return what will be missing, or may be, although the job is accepted: (reason, message)."""
        if spec.validation is None or not (spec.validation.clip_score or spec.validation.preview_steps):
            return []
        sampler = await self._describe()
        if sampler is None:
            return [
                (
                    "SAMPLER_UNKNOWN",
                    f"the sampler at {self._address or '(none)'} does not answer, so nobody knows whether it can score "
                    "pictures and show previews; the job goes on without what it cannot do",
                )
            ]
        if spec.validation.preview_steps and not sampler.has_previews:
            return [
                (
                    "NO_PREVIEWS",
                    "preview_steps: the VAE service has no tiny decoder, so there will be no previews; start it with "
                    "--preview-decoder",
                )
            ]
        return []

    async def close(self) -> None:
        """Close the channel. Safe to repeat."""
        if self._channel is not None:
            await self._channel.close()

    async def _describe(self) -> sampling_pb2.DescribeSamplerResponse | None:
        if not self._address:
            return None
        if self._channel is None:
            self._channel = connect(self._address, retries=False)
        stub: sampling_pb2_grpc.SamplingServiceAsyncStub = sampling_pb2_grpc.SamplingServiceStub(self._channel)
        try:
            with translated():
                return await stub.DescribeSampler(sampling_pb2.DescribeSamplerRequest(), timeout=_DESCRIBE_SECONDS)
        except ReverieError as error:
            logger.info("the sampler is not described: %s", error.message)
            return None
