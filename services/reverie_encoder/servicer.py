"""EncoderService over gRPC: translates messages, checks them, and streams answers as they are ready."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from reverie.encoder.v1 import encoder_pb2
from reverie.encoder.v1.encoder_pb2_grpc import EncoderServiceServicer
from reverie_common.concurrency import as_ready
from reverie_common.errors import FieldViolation, InvalidArgumentError, UnavailableError

from reverie_encoder.embeddings import STORAGES, Embedded, Embeddings

MAX_PROMPTS = 1024
MAX_PROMPT_CHARACTERS = 8192

_ENCODER_OF_NAME = {
    "clip_l": encoder_pb2.ENCODER_CLIP_L,
    "clip_g": encoder_pb2.ENCODER_CLIP_G,
    "t5": encoder_pb2.ENCODER_T5,
    "llama": encoder_pb2.ENCODER_LLAMA,
}
_NAME_OF_ENCODER: dict[int, str] = {encoder: name for name, encoder in _ENCODER_OF_NAME.items()}


class EncoderServicer(EncoderServiceServicer):
    """Serves one `Embeddings`, once there is one."""

    def __init__(self, *, max_in_flight: int) -> None:
        self._max_in_flight = max_in_flight
        self._loaded: Embeddings | None = None

    def serve(self, embeddings: Embeddings) -> None:
        """Answer from now on; before this every call is UNAVAILABLE."""
        self._loaded = embeddings

    async def EncodePrompts(  # noqa: N802 - gRPC's name
        self, request: encoder_pb2.EncodePromptsRequest, context: Any
    ) -> AsyncIterator[encoder_pb2.EncodePromptsResponse]:
        """See the proto."""
        del context
        embeddings = self._embeddings()
        names = _checked_encoders(request, held=[facts.name for facts in embeddings.facts])

        async def embed(numbered: tuple[int, str]) -> encoder_pb2.EncodePromptsResponse:
            index, prompt = numbered
            storage = request.storage or STORAGES[0]
            embedded = await asyncio.gather(*(embeddings.embed(name, prompt, storage) for name in names))
            return encoder_pb2.EncodePromptsResponse(prompt_index=index, embeddings=map(_to_proto, embedded))

        async for response in as_ready(enumerate(request.prompts), embed, max_in_flight=self._max_in_flight):
            yield response

    async def DescribeEncoders(  # noqa: N802 - gRPC's name
        self, request: encoder_pb2.DescribeEncodersRequest, context: Any
    ) -> encoder_pb2.DescribeEncodersResponse:
        """See the proto."""
        del request, context
        return encoder_pb2.DescribeEncodersResponse(
            encoders=[
                encoder_pb2.EncoderDescription(
                    encoder=_ENCODER_OF_NAME[facts.name],
                    fingerprint=facts.fingerprint,
                    precision=facts.precision,
                    device=facts.device,
                    max_length=facts.max_length,
                    shape=facts.shape,
                    dtype=facts.dtype,
                )
                for facts in self._embeddings().facts
            ]
        )

    async def ReleaseMemory(  # noqa: N802 - gRPC's name
        self, request: encoder_pb2.ReleaseMemoryRequest, context: Any
    ) -> encoder_pb2.ReleaseMemoryResponse:
        """See the proto."""
        del request, context
        return encoder_pb2.ReleaseMemoryResponse(released=await self._embeddings().release())

    def _embeddings(self) -> Embeddings:
        if self._loaded is None:
            raise UnavailableError("the encoders are loading; try again", reason="LOADING", retry_after_seconds=2.0)
        return self._loaded


def _to_proto(embedded: Embedded) -> encoder_pb2.Embedding:
    return encoder_pb2.Embedding(
        encoder=_ENCODER_OF_NAME[embedded.encoder],
        tensor=embedded.tensor,
        cached=embedded.cached,
        num_tokens=embedded.cut.num_tokens,
        dropped_text=embedded.cut.dropped_text,
        relative_error=embedded.tensor.relative_error,
    )


def _checked_encoders(request: encoder_pb2.EncodePromptsRequest, *, held: Sequence[str]) -> Sequence[str]:
    """Names of the encoders asked for; raises InvalidArgumentError with everything that is wrong with the request."""
    violations = [
        *_prompt_violations(request.prompts),
        *_encoder_violations(request.encoders, held),
        *_storage_violations(request.storage),
    ]
    if violations:
        raise InvalidArgumentError(
            f"{len(violations)} fields of the request are wrong, the first: {violations[0].description}",
            violations=violations,
        )
    asked = dict.fromkeys(_NAME_OF_ENCODER[encoder] for encoder in request.encoders)
    return tuple(asked) or tuple(held)


def _prompt_violations(prompts: Sequence[str]) -> list[FieldViolation]:
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        description = f"{len(prompts)} prompts, must be 1 to {MAX_PROMPTS}; split the request"
        return [FieldViolation(field="prompts", description=description)]
    return [
        FieldViolation(
            field=f"prompts[{index}]",
            description=f"{len(prompt)} characters, the limit is {MAX_PROMPT_CHARACTERS}; shorten the text",
        )
        for index, prompt in enumerate(prompts)
        if len(prompt) > MAX_PROMPT_CHARACTERS
    ]


def _encoder_violations(encoders: Sequence[int], held: Sequence[str]) -> list[FieldViolation]:
    return [
        FieldViolation(
            field=f"encoders[{index}]",
            description=f"{_encoder_name(encoder)} is not held by this process, which holds {', '.join(held)}",
        )
        for index, encoder in enumerate(encoders)
        if _NAME_OF_ENCODER.get(encoder) not in held
    ]


def _storage_violations(storage: str) -> list[FieldViolation]:
    if not storage or storage in STORAGES:
        return []
    description = f"{storage[:40]!r} is no way to keep embeddings; use one of {', '.join(STORAGES)}"
    return [FieldViolation(field="storage", description=description)]


def _encoder_name(encoder: int) -> str:
    return _NAME_OF_ENCODER.get(encoder, f"encoder {encoder}")
