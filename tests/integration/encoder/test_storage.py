"""How embeddings are kept: exactly, compactly, for a while; over real gRPC and a real store."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from reverie.encoder.v1 import encoder_pb2
from reverie.encoder.v1.encoder_pb2_grpc import EncoderServiceStub
from reverie_client import Reverie
from reverie_common.errors import InvalidArgumentError
from reverie_common.rpc.channel import connect, translated
from reverie_common.rpc.server import Server
from reverie_common.storage import S3Store, get_tensor
from reverie_encoder.service import EncoderService
from reverie_encoder.settings import EncoderSettings
from reverie_hidream.tensor_io import from_raw
from reverie_hidream.text import load_text_encoder

if TYPE_CHECKING:
    from reverie.encoder.v1.encoder_pb2_grpc import EncoderServiceAsyncStub

Ask = Callable[..., Awaitable[dict[int, encoder_pb2.EncodePromptsResponse]]]

ON_DEMAND = "v1/on_demand/"


@asynccontextmanager
async def serving(checkpoint: Path, store: S3Store, **settings: Any) -> AsyncIterator["EncoderServiceAsyncStub"]:
    """A fresh encoder process's service, in this process."""
    chosen = EncoderSettings(checkpoint=str(checkpoint), port=0, metrics_port=0, **settings)
    service = EncoderService(chosen, store)
    async with (
        Server([service.served], chosen, load=service.load, stop=service.close) as server,
        connect(server.target) as channel,
    ):
        yield EncoderServiceStub(channel)


def num_objects(store: S3Store, prefix: str = ON_DEMAND) -> int:
    return len(list(store.list(prefix)))


async def test_compact_and_exact_never_meet(ask: Ask, s3_store: S3Store, tiny_checkpoint: Path) -> None:
    prompts = ["a harbour in fog", "an old tree"]
    async with serving(tiny_checkpoint, s3_store) as stub:
        compact = await ask(stub, prompts, storage="compact")
        exact = await ask(stub, prompts)
        again = await ask(stub, prompts, storage="compact")
    direct = {
        name: load_text_encoder(tiny_checkpoint, name).encode(prompts) for name in ("clip_l", "clip_g", "t5", "llama")
    }
    for index in range(len(prompts)):
        for position, (name, expected) in enumerate(direct.items()):
            small, whole = compact[index].embeddings[position], exact[index].embeddings[position]
            tensor = expected[index].tensor
            restored = from_raw(get_tensor(s3_store, small.tensor))
            assert torch.equal(from_raw(get_tensor(s3_store, whole.tensor)), tensor)
            assert restored.dtype == tensor.dtype
            difference, norm = torch.linalg.vector_norm(restored.double() - tensor.double()), tensor.double().norm()
            assert small.relative_error == pytest.approx(float(difference / norm), rel=1e-9)
            if name in ("t5", "llama"):
                assert 0.001 < small.relative_error < 0.015
                assert small.tensor.encoding == "int8-groups-32"
                assert small.tensor.uri != whole.tensor.uri
                assert (small.cached, whole.cached) == (False, False)
            else:
                # Pooled vectors are kept exactly, so a job of either kind finds those of the other.
                assert small.tensor == whole.tensor
                assert (small.relative_error, whole.cached) == (0.0, True)
    assert [each.tensor for each in again[0].embeddings] == [each.tensor for each in compact[0].embeddings]
    assert all(each.cached for answer in again.values() for each in answer.embeddings)
    assert again[1].embeddings[3].relative_error == compact[1].embeddings[3].relative_error


async def test_compact_is_found_by_another_process_with_its_error(
    ask: Ask, s3_store: S3Store, tiny_checkpoint: Path
) -> None:
    answers = []
    for _ in range(2):
        async with serving(tiny_checkpoint, s3_store, encoders=("t5",)) as stub:
            answers.append((await ask(stub, ["found again"], storage="compact"))[0].embeddings[0])
    assert [answer.cached for answer in answers] == [False, True]
    assert answers[0].tensor == answers[1].tensor
    assert answers[0].relative_error == answers[1].relative_error > 0


async def test_on_demand_never_keeps_more_than_its_bound(ask: Ask, s3_store: S3Store, tiny_checkpoint: Path) -> None:
    bound, counts, is_done = 6, [], asyncio.Event()

    async def watch() -> None:
        while not is_done.is_set():
            counts.append(await asyncio.to_thread(num_objects, s3_store))

    async with serving(tiny_checkpoint, s3_store, on_demand_objects=bound, dtype="float32") as stub:
        watching = asyncio.create_task(watch())
        prompts = [f"passing by number {index}" for index in range(20)]
        for start in range(0, len(prompts), 5):
            await ask(stub, prompts[start : start + 5], storage="on_demand")
        last = await ask(stub, prompts[-1:], storage="on_demand")
        is_done.set()
        await watching
        assert max(counts) <= bound
        assert num_objects(s3_store) == bound
        assert num_objects(s3_store, "v1/text/") == 0
        # What was asked for last is there, exactly.
        llama = load_text_encoder(tiny_checkpoint, "llama", dtype=torch.float32).encode(prompts[-1:])[0].tensor
        assert torch.equal(from_raw(get_tensor(s3_store, last[0].embeddings[3].tensor)), llama)
        assert all(embedding.relative_error == 0 for embedding in last[0].embeddings)


async def test_on_demand_takes_what_is_kept_anyway(ask: Ask, s3_store: S3Store, tiny_checkpoint: Path) -> None:
    async with serving(tiny_checkpoint, s3_store) as stub:
        kept = await ask(stub, ["kept for good"])
        passing = await ask(stub, ["kept for good"], storage="on_demand")
    assert [each.tensor for each in passing[0].embeddings] == [each.tensor for each in kept[0].embeddings]
    assert all(each.cached for each in passing[0].embeddings)
    assert num_objects(s3_store) == 0


async def test_a_new_process_deletes_what_a_dead_one_left_and_makes_it_again(
    ask: Ask, s3_store: S3Store, tiny_checkpoint: Path
) -> None:
    stranger = f"{ON_DEMAND}{'0' * 64}/00/of-another-encoder"
    s3_store.create(stranger, b"x")
    async with serving(tiny_checkpoint, s3_store, encoders=("t5",)) as stub:
        before = await ask(stub, ["left behind"], storage="on_demand")
        await ask(stub, ["left behind too"], storage="on_demand")
    assert num_objects(s3_store) == 3
    async with serving(tiny_checkpoint, s3_store, encoders=("t5",)) as stub:
        assert [found.key for found in s3_store.list(ON_DEMAND)] == [stranger]
        after = await ask(stub, ["left behind"], storage="on_demand")
    assert after[0].embeddings[0].tensor == before[0].embeddings[0].tensor
    assert not after[0].embeddings[0].cached


async def test_the_sdk_asks_for_the_storage_it_is_told(s3_store: S3Store, tiny_checkpoint: Path) -> None:
    settings = EncoderSettings(checkpoint=str(tiny_checkpoint), encoders=("t5",), port=0, metrics_port=0)
    service = EncoderService(settings, s3_store)
    async with (
        Server([service.served], settings, load=service.load, stop=service.close) as server,
        Reverie(encoder=server.target) as reverie,
    ):
        found = {
            storage: [answer.embeddings[0].tensor async for answer in reverie.encoders.encode(["sdk"], storage=storage)]
            for storage in ("on_demand", "exact", "compact")
        }
    assert [found[storage][0].encoding for storage in found] == ["", "", "int8-groups-32"]
    assert "/on_demand/" in found["on_demand"][0].uri
    assert "/text/" in found["exact"][0].uri


async def test_an_unknown_storage_is_refused_by_name(ask: Ask, s3_store: S3Store, tiny_checkpoint: Path) -> None:
    async with serving(tiny_checkpoint, s3_store, encoders=("clip_l",)) as stub:
        with pytest.raises(InvalidArgumentError) as refusal, translated():
            await ask(stub, ["p"], storage="zip")
    assert [violation.field for violation in refusal.value.violations] == ["storage"]
    assert "exact, compact, on_demand" in refusal.value.violations[0].description
