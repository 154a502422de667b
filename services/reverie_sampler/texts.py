"""Embeddings of prompts, from the encoder services; those of the last prompts stay in memory."""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from reverie.common.v1.common_pb2 import TensorRef
from reverie.encoder.v1 import encoder_pb2
from reverie_common.errors import FailedPreconditionError
from reverie_common.rpc.channel import repeat_while_unavailable
from reverie_common.storage import ObjectStore, RawTensor, get_tensor

if TYPE_CHECKING:
    from reverie.encoder.v1.encoder_pb2_grpc import EncoderServiceAsyncStub

DESCRIBE_TIMEOUT_SECONDS = 10.0
ENCODE_TIMEOUT_SECONDS = 120.0

NAMES: Mapping[int, str] = {
    encoder_pb2.ENCODER_CLIP_L: "clip_l",
    encoder_pb2.ENCODER_CLIP_G: "clip_g",
    encoder_pb2.ENCODER_T5: "t5",
    encoder_pb2.ENCODER_LLAMA: "llama",
}

Embeddings = Mapping[str, RawTensor]
"""One prompt's embedding by each encoder."""


class Texts:
    """Asks whichever service holds an encoder. Belongs to one event loop."""

    def __init__(
        self,
        stubs: "Sequence[EncoderServiceAsyncStub]",
        store: ObjectStore,
        *,
        capacity: int,
        patience_seconds: float,
    ) -> None:
        """Nothing is asked yet.

        Args:
            stubs: encoder services that together hold all four encoders.
            capacity: prompts whose embeddings stay in memory.
            patience_seconds: how long a service may be away.
        """
        self._stubs = tuple(stubs)
        self._store = store
        self._capacity = capacity
        self._patience_seconds = patience_seconds
        self._known: OrderedDict[tuple[str, str], Embeddings] = OrderedDict()

    async def fingerprints(self) -> dict[str, str]:
        """What embeddings depend on besides the prompt, by encoder.

        Raises:
            UnavailableError: a service is away.
            FailedPreconditionError: an encoder is held by none of them.
        """
        holders = await self._holders()
        return {name: fingerprint for name, (_, fingerprint) in sorted(holders.items())}

    async def embed(self, prompt: str) -> Embeddings:
        """A prompt's embeddings, made if the store has none.

        Raises:
            UnavailableError: a service or the store is away.
        """
        holders = await self._holders()
        key = (prompt, "/".join(fingerprint for _, fingerprint in holders.values()))
        if key not in self._known:
            refs = await self._encode(prompt, holders)
            raws = await asyncio.gather(*(asyncio.to_thread(get_tensor, self._store, ref) for ref in refs.values()))
            self._known[key] = dict(zip(refs, raws, strict=True))
        self._known.move_to_end(key)
        embeddings = self._known[key]
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return embeddings

    async def _holders(self) -> dict[str, tuple[int, str]]:
        """For each encoder the index of a service that holds it, and its fingerprint there."""
        descriptions = await asyncio.gather(*(self._describe(stub) for stub in self._stubs))
        holders: dict[str, tuple[int, str]] = {}
        for index, description in enumerate(descriptions):
            for held in description.encoders:
                holders.setdefault(NAMES[held.encoder], (index, held.fingerprint))
        missing = [name for name in NAMES.values() if name not in holders]
        if missing:
            raise FailedPreconditionError(
                f"no encoder service holds {', '.join(missing)}; start one that does and name it in --encoders",
                reason="ENCODER_MISSING",
                metadata={"encoders": ",".join(missing)},
            )
        return {name: holders[name] for name in NAMES.values()}

    async def _describe(self, stub: "EncoderServiceAsyncStub") -> encoder_pb2.DescribeEncodersResponse:
        request = encoder_pb2.DescribeEncodersRequest()
        return await repeat_while_unavailable(
            lambda: stub.DescribeEncoders(request, timeout=DESCRIBE_TIMEOUT_SECONDS),
            limit_seconds=self._patience_seconds,
        )

    async def _encode(self, prompt: str, holders: Mapping[str, tuple[int, str]]) -> dict[str, TensorRef]:
        by_service: dict[int, list[encoder_pb2.Encoder.ValueType]] = {}
        numbers = {name: number for number, name in NAMES.items()}
        for name, (index, _) in holders.items():
            by_service.setdefault(index, []).append(encoder_pb2.Encoder.ValueType(numbers[name]))
        answers = await asyncio.gather(
            *(
                repeat_while_unavailable(
                    partial(self._ask, index, prompt, encoders), limit_seconds=self._patience_seconds
                )
                for index, encoders in by_service.items()
            )
        )
        return {name: ref for answer in answers for name, ref in answer.items()}

    async def _ask(
        self, index: int, prompt: str, encoders: Sequence[encoder_pb2.Encoder.ValueType]
    ) -> dict[str, TensorRef]:
        request = encoder_pb2.EncodePromptsRequest(prompts=[prompt], encoders=encoders)
        refs: dict[str, TensorRef] = {}
        async for response in self._stubs[index].EncodePrompts(request, timeout=ENCODE_TIMEOUT_SECONDS):
            refs.update({NAMES[embedding.encoder]: embedding.tensor for embedding in response.embeddings})
        return refs
