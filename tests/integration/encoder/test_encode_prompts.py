"""EncodePrompts over real gRPC and a real store, against the encoders called directly."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from reverie.encoder.v1 import encoder_pb2
from reverie.encoder.v1.encoder_pb2_grpc import EncoderServiceStub
from reverie_common.errors import InvalidArgumentError, ResourceExhaustedError, StoreUnavailableError, UnavailableError
from reverie_common.rpc.channel import connect, translated
from reverie_common.rpc.server import Server
from reverie_common.storage import S3Store, get_tensor
from reverie_common.storage.seaweed import Seaweed
from reverie_encoder.service import EncoderService
from reverie_encoder.settings import EncoderSettings
from reverie_hidream.tensor_io import from_raw
from reverie_hidream.text import ENCODER_NAMES, load_text_encoder

if TYPE_CHECKING:
    from reverie.encoder.v1.encoder_pb2_grpc import EncoderServiceAsyncStub

pytestmark = pytest.mark.asyncio(loop_scope="module")

Answers = dict[int, encoder_pb2.EncodePromptsResponse]
Ask = Callable[..., Awaitable[Answers]]

ENCODERS = (
    encoder_pb2.ENCODER_CLIP_L,
    encoder_pb2.ENCODER_CLIP_G,
    encoder_pb2.ENCODER_T5,
    encoder_pb2.ENCODER_LLAMA,
)


def num_computed(answers: Answers) -> int:
    """Embeddings that were computed for this request."""
    return sum(not embedding.cached for answer in answers.values() for embedding in answer.embeddings)


async def test_answers_equal_the_encoders_called_directly(
    stub: "EncoderServiceAsyncStub", ask: Ask, module_s3_store: S3Store, tiny_checkpoint: Path
) -> None:
    prompts = ["a photo of a cat", "", "Zwei Schiffe \u2013 eine K\u00fcste"]
    answers = await ask(stub, prompts)
    for position, name in enumerate(ENCODER_NAMES):
        direct = load_text_encoder(tiny_checkpoint, name, dtype=torch.float32).encode(prompts)
        for index, expected in enumerate(direct):
            embedding = answers[index].embeddings[position]
            assert embedding.encoder == ENCODERS[position]
            assert torch.equal(from_raw(get_tensor(module_s3_store, embedding.tensor)), expected.tensor)
            assert (embedding.num_tokens, embedding.dropped_text) == (expected.num_tokens, "")


async def test_a_prompt_is_computed_once_for_all_time(
    stub: "EncoderServiceAsyncStub", ask: Ask, module_s3_store: S3Store, encoder_settings: EncoderSettings
) -> None:
    prompts = ["a boat at dusk", "a boat at dawn"]
    first = await ask(stub, prompts)
    second = await ask(stub, prompts)
    another = EncoderService(encoder_settings, module_s3_store)
    async with (
        Server([another.served], encoder_settings, load=another.load, stop=another.close) as server,
        connect(server.target) as channel,
    ):
        third = await ask(EncoderServiceStub(channel), prompts)
    assert [num_computed(first), num_computed(second), num_computed(third)] == [8, 0, 0]
    tensors = [[e.tensor for e in answers[i].embeddings] for answers in (first, second, third) for i in range(2)]
    assert tensors[0:2] == tensors[2:4] == tensors[4:6]


async def test_one_changed_character_computes_one_prompt(stub: "EncoderServiceAsyncStub", ask: Ask) -> None:
    prompts = [f"tree number {index}" for index in range(5)]
    await ask(stub, prompts)
    prompts[3] += "!"
    answers = await ask(stub, prompts)
    assert [sum(not e.cached for e in answers[index].embeddings) for index in range(5)] == [0, 0, 0, 4, 0]


async def test_a_prompt_that_is_given_twice_is_computed_once(stub: "EncoderServiceAsyncStub", ask: Ask) -> None:
    answers = await ask(stub, ["twice"] * 6, [encoder_pb2.ENCODER_LLAMA])
    assert num_computed(answers) == 1


async def test_concurrent_requests_share_one_computation(stub: "EncoderServiceAsyncStub", ask: Ask) -> None:
    prompts = [f"a shared prompt {index}" for index in range(6)]
    answers = await asyncio.gather(*(ask(stub, prompts) for _ in range(5)))
    assert sum(num_computed(each) for each in answers) == 4 * len(prompts)


async def test_encoders_are_answered_in_the_order_asked_for(stub: "EncoderServiceAsyncStub", ask: Ask) -> None:
    asked = [encoder_pb2.ENCODER_T5, encoder_pb2.ENCODER_CLIP_L, encoder_pb2.ENCODER_T5]
    answers = await ask(stub, ["order"], asked)
    assert [embedding.encoder for embedding in answers[0].embeddings] == asked[:2]


async def test_what_was_cut_is_reported_also_from_the_cache(stub: "EncoderServiceAsyncStub", ask: Ask) -> None:
    prompt = " ".join(f"word{number}" for number in range(300)) + " the very end"
    fresh = (await ask(stub, [prompt]))[0].embeddings
    cached = (await ask(stub, [prompt]))[0].embeddings
    for before, after in zip(fresh, cached, strict=True):
        assert before.num_tokens == after.num_tokens > 128
        assert before.dropped_text == after.dropped_text
        assert before.dropped_text.endswith("the very end")
        assert prompt.endswith(before.dropped_text)
        assert (before.cached, after.cached) == (False, True)


async def test_every_wrong_field_is_named_at_once(stub: "EncoderServiceAsyncStub", ask: Ask) -> None:
    with pytest.raises(InvalidArgumentError) as refusal, translated():
        await ask(stub, ["fine", "x" * 10_000, "y" * 8192, "z" * 8193], [encoder_pb2.ENCODER_UNSPECIFIED, 9])
    fields = [violation.field for violation in refusal.value.violations]
    assert fields == ["prompts[1]", "prompts[3]", "encoders[0]", "encoders[1]"]
    assert "10000 characters" in refusal.value.violations[0].description
    assert "8192" in refusal.value.violations[0].description


@pytest.mark.parametrize("num_prompts", [0, 1025])
async def test_refuses_too_few_and_too_many_prompts(
    stub: "EncoderServiceAsyncStub", ask: Ask, num_prompts: int
) -> None:
    with pytest.raises(InvalidArgumentError) as refusal, translated():
        await ask(stub, ["p"] * num_prompts)
    assert [violation.field for violation in refusal.value.violations] == ["prompts"]


async def test_a_caller_that_hangs_up_leaves_the_service_working(stub: "EncoderServiceAsyncStub", ask: Ask) -> None:
    request = encoder_pb2.EncodePromptsRequest(prompts=[f"abandoned {index}" for index in range(40)])
    call: Any = stub.EncodePrompts(request)
    await anext(aiter(call))
    call.cancel()
    answers = await ask(stub, ["still here"])
    assert num_computed(answers) == 4


async def test_describes_what_it_holds(stub: "EncoderServiceAsyncStub", tiny_checkpoint: Path) -> None:
    direct = [load_text_encoder(tiny_checkpoint, name, dtype=torch.float32) for name in ENCODER_NAMES]
    described = await stub.DescribeEncoders(encoder_pb2.DescribeEncodersRequest())
    assert [encoder.encoder for encoder in described.encoders] == list(ENCODERS)
    assert [tuple(encoder.shape) for encoder in described.encoders] == [encoder.shape for encoder in direct]
    assert [encoder.fingerprint for encoder in described.encoders] == [encoder.fingerprint for encoder in direct]
    assert {encoder.dtype for encoder in described.encoders} == {"F32"}
    assert {encoder.device for encoder in described.encoders} == {"cpu"}
    assert {encoder.max_length for encoder in described.encoders} == {128}


async def test_a_subset_in_bfloat16_and_int8_says_so_and_refuses_the_rest(
    ask: Ask, s3_store: S3Store, tiny_checkpoint: Path
) -> None:
    settings = EncoderSettings(
        checkpoint=str(tiny_checkpoint),
        encoders=("llama", "clip_l"),
        precision=("llama=int8-quanto",),
        port=0,
        metrics_port=0,
    )
    service = EncoderService(settings, s3_store)
    async with (
        Server([service.served], settings, load=service.load, stop=service.close) as server,
        connect(server.target) as channel,
    ):
        stub = EncoderServiceStub(channel)
        described = await stub.DescribeEncoders(encoder_pb2.DescribeEncodersRequest())
        answers = await ask(stub, ["quantised"])
        with pytest.raises(InvalidArgumentError) as refusal, translated():
            await ask(stub, ["p"], [encoder_pb2.ENCODER_T5])
    assert [(each.precision, each.dtype) for each in described.encoders] == [
        ("int8-quanto", "BF16"),
        ("no_change", "BF16"),
    ]
    direct = load_text_encoder(tiny_checkpoint, "llama", precision="int8-quanto").encode(["quantised"])[0]
    assert torch.equal(from_raw(get_tensor(s3_store, answers[0].embeddings[0].tensor)), direct.tensor)
    assert refusal.value.violations[0].field == "encoders[0]"
    assert "llama, clip_l" in refusal.value.violations[0].description


async def test_a_full_queue_is_refused_with_the_time_to_come_back(
    ask: Ask, s3_store: S3Store, tiny_checkpoint: Path
) -> None:
    settings = EncoderSettings(
        checkpoint=str(tiny_checkpoint), encoders=("clip_l",), max_waiting=2, max_batch_size=1, port=0, metrics_port=0
    )
    service = EncoderService(settings, s3_store)
    async with (
        Server([service.served], settings, load=service.load, stop=service.close) as server,
        connect(server.target) as channel,
    ):
        stub = EncoderServiceStub(channel)
        with pytest.raises(ResourceExhaustedError) as refusal, translated():
            await ask(stub, [f"crowd {index}" for index in range(60)])
        answers = await ask(stub, ["alone"])
    assert refusal.value.reason == "QUEUE_FULL"
    assert refusal.value.metadata["max_waiting"] == "2"
    assert refusal.value.retry_after_seconds is not None
    assert num_computed(answers) == 1


async def test_a_store_that_is_gone_is_unavailable_and_comes_back(
    ask: Ask, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    seaweed = Seaweed(tmp_path)
    seaweed.start()
    store = S3Store(seaweed.endpoint, seaweed.bucket, seaweed.access_key, seaweed.secret_key, retry_seconds=0.0)
    settings = EncoderSettings(checkpoint=str(tiny_checkpoint), encoders=("clip_l",), port=0, metrics_port=0)
    service = EncoderService(settings, store)
    try:
        async with (
            Server([service.served], settings, load=service.load, stop=service.close) as server,
            connect(server.target, retries=False) as channel,
        ):
            stub = EncoderServiceStub(channel)
            await ask(stub, ["before"])
            await asyncio.to_thread(seaweed.stop)
            with pytest.raises(UnavailableError) as refusal, translated():
                await ask(stub, ["while it is gone"])
            await asyncio.to_thread(seaweed.start)
            answers = await ask(stub, ["before", "while it is gone"])
    finally:
        await asyncio.to_thread(seaweed.stop)
    assert refusal.value.reason == StoreUnavailableError.default_reason
    assert [answers[index].embeddings[0].cached for index in range(2)] == [True, False]
