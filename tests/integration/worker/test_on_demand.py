"""Training on captions that are encoded when they are needed: a real encoder service, a bound, outages."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from reverie.common.v1.common_pb2 import ObjectRef
from reverie.encoder.v1 import encoder_pb2
from reverie.encoder.v1.encoder_pb2_grpc import EncoderServiceStub
from reverie.training.v1.job_pb2 import TrainingJobEvent
from reverie.training.v1.training_pb2 import (
    WORKER_OUTCOME_FAILED,
    WORKER_OUTCOME_STOPPED,
    WORKER_OUTCOME_SUCCEEDED,
)
from reverie_common.rpc.channel import connect
from reverie_common.storage import ObjectStore, get_object, put_object
from reverie_common.storage.keys import checkpoint_manifest_key, content_digest, prepared_key
from reverie_encoder.service import EncoderService
from reverie_encoder.settings import EncoderSettings

Work = Callable[..., int]

NAMES = dict(enumerate(("", "clip_l", "clip_g", "t5", "llama")))
CAPTIONS = tuple(f"scene number {index} of forty" for index in range(40))
PREFIX = "v1/on_demand/"
BOUND = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoders:
    """An encoder service that a test starts and stops."""

    service: EncoderService
    loop_thread: Any
    store: ObjectStore

    @contextmanager
    def serving(self, port: int = 0) -> Iterator[str]:
        """Serve it; yields `host:port`."""
        with self.loop_thread.serving(self.service.served, port) as address:
            yield address

    def ask(self, address: str, prompts: tuple[str, ...], storage: str) -> list[dict[str, Any]]:
        """References to the prompts' embeddings, as a manifest has them."""
        return self.loop_thread.run(_ask(address, prompts, storage))  # type: ignore[no-any-return]  # a fixture's class

    def fingerprints(self, address: str) -> dict[str, str]:
        """What the embeddings depend on, by encoder."""
        return self.loop_thread.run(_describe(address))  # type: ignore[no-any-return]  # a fixture's class


async def _ask(address: str, prompts: tuple[str, ...], storage: str) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    async with connect(address) as channel:
        request = encoder_pb2.EncodePromptsRequest(prompts=prompts, storage=storage)
        async for answer in EncoderServiceStub(channel).EncodePrompts(request):
            found[answer.prompt_index] = {
                NAMES[each.encoder]: MessageToDict(each.tensor, preserving_proto_field_name=True)
                for each in answer.embeddings
            }
    return [{"text": prompt, "embeddings": found[index]} for index, prompt in enumerate(prompts)]


async def _describe(address: str) -> dict[str, str]:
    async with connect(address) as channel:
        described = await EncoderServiceStub(channel).DescribeEncoders(encoder_pb2.DescribeEncodersRequest())
    return {NAMES[each.encoder]: each.fingerprint for each in described.encoders}


@pytest.fixture
def encoders(prepared: Any, loop_thread: Any) -> Iterator[Encoders]:
    """The tiny checkpoint's encoders in float32, on the store of the prepared data."""
    settings = EncoderSettings(
        checkpoint=str(prepared.checkpoint), dtype="float32", on_demand_objects=BOUND, port=0, metrics_port=0
    )
    service = EncoderService(settings, prepared.store)
    loop_thread.run(service.load())
    yield Encoders(service=service, loop_thread=loop_thread, store=prepared.store)
    loop_thread.run(service.close())


def write_manifest(prepared: Any, captions: list[dict[str, Any]], fingerprints: dict[str, str], name: str) -> ObjectRef:
    """The prepared images with other captions, ten alternatives each."""
    manifest = json.loads(get_object(prepared.store, prepared.manifest))
    for index, sample in enumerate(manifest["samples"]):
        sample["captions"] = [[caption] for caption in captions[index :: len(manifest["samples"])]]
    manifest["encoders"] = fingerprints
    body = json.dumps(manifest).encode()
    return put_object(prepared.store, prepared_key(name.ljust(64, "0")), body, "application/json")


def on_demand(prepared: Any, fingerprints: dict[str, str]) -> ObjectRef:
    captions = [{"text": text, "embeddings": {}} for text in CAPTIONS]
    return write_manifest(prepared, captions, fingerprints, content_digest({"encoders": fingerprints}))


def count_objects(store: ObjectStore, is_done: threading.Event, counts: list[int]) -> None:
    while not is_done.wait(0.02):
        counts.append(len(list(store.list(PREFIX))))


def test_trains_what_exact_storage_trains_and_never_keeps_more_than_the_bound(
    prepared: Any, work: Work, encoders: Encoders
) -> None:
    steps = {"optimization": {"max_steps": 60, "caption_dropout_probability": 0.1}, "checkpoints": {"every_steps": 0}}
    counts: list[int] = []
    is_done = threading.Event()
    counting = threading.Thread(target=count_objects, args=(prepared.store, is_done, counts))
    with encoders.serving() as address:
        trainer = prepared.trainer(name="job-demand", embedding_storage="on_demand", **steps)
        trainer.prepared = on_demand(prepared, encoders.fingerprints(address))
        counting.start()
        # No memory for what was read: every visit comes from the store or from the encoders.
        assert work(trainer, encoders=(address,), cache_bytes=0) == 0
        is_done.set()
        counting.join()
        exact = prepared.trainer(name="job-exact", **steps)
        exact.job.spec.name = trainer.job.spec.name
        captions = encoders.ask(address, CAPTIONS, "exact")
        exact.prepared = write_manifest(prepared, captions, {}, "e")
    work(exact)
    assert trainer.completions[0].outcome == WORKER_OUTCOME_SUCCEEDED
    assert max(counts) == BOUND
    assert trainer.losses() == exact.losses()
    assert trainer.completions[0].adapter.sha256 == exact.completions[0].adapter.sha256


def test_waits_for_an_encoder_that_is_away_and_says_so(
    prepared: Any, work: Work, encoders: Encoders, free_port: Callable[[], int]
) -> None:
    port = free_port()
    with encoders.serving() as address:
        fingerprints = encoders.fingerprints(address)
    trainer = prepared.trainer(name="job-away", embedding_storage="on_demand")
    trainer.prepared = on_demand(prepared, fingerprints)
    starting: list[asyncio.Task[Any]] = []

    def start_when_told(event: TrainingJobEvent) -> None:
        if event.notice.message.startswith("waiting for the encoder service"):
            # In the loop that serves the trainer too: nothing may block here.
            starting.append(asyncio.create_task(encoders.loop_thread.serve(encoders.service.served, port)))

    trainer.on_event = start_when_told
    assert work(trainer, encoders=(f"127.0.0.1:{port}",)) == 0
    assert trainer.completions[0].outcome == WORKER_OUTCOME_SUCCEEDED
    reasons = trainer.notices()
    assert reasons.index("UNAVAILABLE") < reasons.index("SERVICE_BACK")


def test_an_encoder_that_stays_away_fails_the_job_with_the_remedy(
    prepared: Any, work: Work, free_port: Callable[[], int]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    trainer = prepared.trainer(name="job-gone", embedding_storage="on_demand")
    trainer.prepared = on_demand(prepared, {"t5": "a"})
    assert work(trainer, encoders=(address,), encoder_patience_seconds=0.5) == 0
    failure = trainer.completions[0].failure
    assert trainer.completions[0].outcome == WORKER_OUTCOME_FAILED
    assert failure.reason == "UNAVAILABLE"
    assert f"the encoder service at {address}" in failure.message
    assert "resume" in failure.remedy


def test_stops_and_saves_while_it_waits_for_an_encoder(
    prepared: Any, work: Work, encoders: Encoders, free_port: Callable[[], int]
) -> None:
    trainer = prepared.trainer(name="job-waits", embedding_storage="on_demand")
    trainer.prepared = on_demand(prepared, {"t5": "a"})

    def stop_when_told(event: TrainingJobEvent) -> None:
        if event.notice.message.startswith("waiting for the encoder service"):
            trainer.should_stop = True

    trainer.on_event = stop_when_told
    assert work(trainer, encoders=(f"127.0.0.1:{free_port()}",)) == 0
    assert trainer.completions[0].outcome == WORKER_OUTCOME_STOPPED


def test_a_resumed_job_ends_in_the_same_bytes(prepared: Any, work: Work, encoders: Encoders) -> None:
    with encoders.serving() as address:
        fingerprints = encoders.fingerprints(address)
        straight = prepared.trainer(name="job-od-straight", embedding_storage="on_demand")
        resumed = prepared.trainer(name="job-od-resumed", embedding_storage="on_demand")
        for trainer in (straight, resumed):
            trainer.job.spec.name = "od"
            trainer.prepared = on_demand(prepared, fingerprints)
        work(straight, encoders=(address,))

        def stop(event: TrainingJobEvent) -> None:
            resumed.should_stop = resumed.should_stop or event.step.step >= 2

        resumed.on_event = stop
        work(resumed, encoders=(address,))
        last = resumed.of_kind("checkpoint")[-1].step
        body = prepared.store.get(key := checkpoint_manifest_key("job-od-resumed", last))
        resumed.checkpoint = put_object(prepared.store, key, body, "application/json")
        resumed.should_stop, resumed.on_event = False, lambda _: None
        work(resumed, encoders=(address,))
    assert resumed.completions[-1].outcome == WORKER_OUTCOME_SUCCEEDED
    assert resumed.completions[-1].adapter.sha256 == straight.completions[0].adapter.sha256


def test_other_encoders_than_those_of_the_preparation_fail_the_job(
    prepared: Any, work: Work, encoders: Encoders
) -> None:
    with encoders.serving() as address:
        fingerprints = {**encoders.fingerprints(address), "t5": "0" * 64}
        trainer = prepared.trainer(name="job-other", embedding_storage="on_demand")
        trainer.prepared = on_demand(prepared, fingerprints)
        assert work(trainer, encoders=(address,)) == 0
    failure = trainer.completions[0].failure
    assert failure.reason == "ENCODERS_CHANGED"
    assert failure.message.startswith("t5 of the encoder services")
