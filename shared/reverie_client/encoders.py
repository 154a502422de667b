"""The text encoders, for those who want embeddings without a job."""

from collections.abc import AsyncIterator, Sequence

import grpc
from reverie.encoder.v1 import encoder_pb2 as pb
from reverie.encoder.v1.encoder_pb2_grpc import EncoderServiceStub

from reverie_client.calls import CallPolicy, call, stream


class Encoders:
    """`reverie.encoders`: every RPC of EncoderService."""

    def __init__(self, channel: grpc.aio.Channel, policy: CallPolicy) -> None:
        """Call the EncoderService behind `channel`."""
        self._stub = EncoderServiceStub(channel)
        self._policy = policy

    async def encode(
        self, prompts: Sequence[str], *, encoders: Sequence["pb.Encoder.ValueType"] = (), storage: str = "exact"
    ) -> AsyncIterator[pb.EncodePromptsResponse]:
        """Yield one response for each prompt, in any order; no `encoders` means every one that the server holds.

        `storage` is how the embeddings are kept: `exact`, `compact` or `on_demand`.
        """
        request = pb.EncodePromptsRequest(prompts=prompts, encoders=encoders, storage=storage)
        async for response in stream(self._stub.EncodePrompts, request, self._policy):
            yield response

    async def describe(self) -> tuple[pb.EncoderDescription, ...]:
        """Return what the server holds, an entry for each encoder."""
        answer = await call(self._stub.DescribeEncoders, pb.DescribeEncodersRequest(), self._policy)
        return tuple(answer.encoders)

    async def release_memory(self) -> bool:
        """Have idle encoders wait in host memory until their next request; returns whether all do now."""
        answer = await call(self._stub.ReleaseMemory, pb.ReleaseMemoryRequest(), self._policy)
        return answer.released
