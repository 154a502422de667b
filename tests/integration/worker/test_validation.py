"""Validation pictures beside the training: a sampler that answers, that comes late, that refuses, that is dead."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from reverie.common.v1.common_pb2 import ObjectRef
from reverie.sampling.v1 import sampling_pb2
from reverie.sampling.v1.sampling_pb2_grpc import SamplingServiceServicer, add_SamplingServiceServicer_to_server
from reverie.training.v1.job_pb2 import TrainingJobEvent
from reverie.training.v1.training_pb2 import WORKER_OUTCOME_STOPPED, WORKER_OUTCOME_SUCCEEDED
from reverie_common.errors import FailedPreconditionError, InvalidArgumentError
from reverie_common.rpc.server import ServedService
from reverie_common.storage import get_object
from reverie_common.storage.keys import checkpoint_manifest_key

Work = Callable[..., int]

VALIDATION: dict[str, Any] = {
    "every_steps": 3,
    "prompts": [{"name": "cat", "prompt": "a cat"}, {"name": "dog", "prompt": "a dog"}],
    "resolutions": ["64x64", "96x64"],
    "num_inference_steps": 1,
    "guidance_scale": 2.5,
    "negative_prompt": "blurry",
    "num_images": 2,
    "adapter_strength": 0.75,
}


PREVIEW = ObjectRef(uri="s3://bucket/preview.png", media_type="image/png")


class QuickSampler(SamplingServiceServicer):
    """Answers at once with pictures that it does not draw, and remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[sampling_pb2.SampleRequest] = []
        self.refuses = False
        self.has_clip_model = True
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def Sample(  # noqa: N802 - gRPC's name
        self, request: sampling_pb2.SampleRequest, context: Any
    ) -> AsyncIterator[sampling_pb2.SampleResponse]:
        self.requests.append(request)
        if self.refuses:
            raise InvalidArgumentError("too large")
        if request.clip_score and not self.has_clip_model:
            raise FailedPreconditionError("start it with --clip-model", reason="NO_CLIP_MODEL")
        await self.may_answer.wait()
        yield sampling_pb2.SampleResponse(progress=sampling_pb2.SamplingProgress(step=1, num_steps=1))
        if request.preview_steps:
            preview = sampling_pb2.SamplingPreview(step=1, num_steps=20, timestep=1000.0, image=PREVIEW)
            yield sampling_pb2.SampleResponse(preview=preview)
            notice = sampling_pb2.SamplingNotice(reason="PREVIEWS_LOST", message="the VAE is slow")
            yield sampling_pb2.SampleResponse(notice=notice)
        for index in range(request.num_images):
            image = sampling_pb2.SampledImage(
                image_index=index,
                image=ObjectRef(uri=f"s3://bucket/{len(self.requests)}-{index}.png", media_type="image/png"),
                width=request.width,
                height=request.height,
                seed=request.seed + index,
                clip_score=20.0 + index if request.clip_score else None,
            )
            yield sampling_pb2.SampleResponse(image=image)

    async def DescribeSampler(  # noqa: N802 - gRPC's name
        self, request: sampling_pb2.DescribeSamplerRequest, context: Any
    ) -> sampling_pb2.DescribeSamplerResponse:
        return sampling_pb2.DescribeSamplerResponse(precision="no_change", device="cpu")


@pytest.fixture
def serve_sampler(loop_thread: Any) -> Callable[..., Any]:
    """Context manager that serves a QuickSampler and yields its address."""
    return lambda sampler: loop_thread.serving(_served(sampler))


def _served(sampler: QuickSampler) -> ServedService:
    return ServedService(
        name="reverie.sampling.v1.SamplingService",
        add_to_server=add_SamplingServiceServicer_to_server,
        servicer=sampler,
    )


def test_asks_for_every_picture_of_every_round_once(prepared: Any, work: Work, serve_sampler: Any) -> None:
    sampler, trainer = QuickSampler(), prepared.trainer(name="job-drawn", validation=VALIDATION)
    with serve_sampler(sampler) as address:
        assert work(trainer, sampler=address) == 0
    images = trainer.of_kind("validation_image")
    asked = [(image.step, image.prompt_name, image.image_index, image.width, image.height) for image in images]
    expected = [
        (step, name, index, width, 64)
        for step in (0, 3, 6)
        for name in ("cat", "dog")
        for width in (64, 96)
        for index in (0, 1)
    ]
    assert asked == expected
    progress = [(one.step, one.num_done, one.num_total) for one in trainer.of_kind("validation_progress")]
    assert progress == [(step, done, 8) for step in (0, 3, 6) for done in range(1, 9)]
    assert trainer.phases["validate"] > 0


@pytest.mark.parametrize(
    ("wanted", "drawn"), [("none", ["adapter"]), ("ema_only", ["ema"]), ("comparison", ["adapter", "ema"])]
)
def test_draws_the_adapter_the_average_or_both(
    prepared: Any, work: Work, serve_sampler: Any, wanted: str, drawn: list[str]
) -> None:
    validation = {**VALIDATION, "prompts": VALIDATION["prompts"][:1], "resolutions": ["64x64"], "num_images": 1}
    changes = {"validation": validation, "ema": {"decay": 0.9, "validation": wanted}}
    sampler, trainer = QuickSampler(), prepared.trainer(name=f"job-{wanted.replace('_', '-')}", **changes)
    with serve_sampler(sampler) as address:
        assert work(trainer, sampler=address) == 0
    images = trainer.of_kind("validation_image")
    results = {"adapter": trainer.completions[0].adapter, "ema": trainer.completions[0].ema_adapter}
    asked = [request.adapter.sha256 for request in sampler.requests[-len(drawn) :]]
    assert [(image.step, image.weights) for image in images if image.step] == [(s, w) for s in (3, 6) for w in drawn]
    assert asked == [results[weights].sha256 for weights in drawn]


def test_asks_for_what_the_job_says(prepared: Any, work: Work, serve_sampler: Any) -> None:
    sampler, trainer = QuickSampler(), prepared.trainer(name="job-asked", validation=VALIDATION)
    with serve_sampler(sampler) as address:
        work(trainer, sampler=address)
    base, last = sampler.requests[0], sampler.requests[-1]
    assert (base.prompt, base.negative_prompt, base.seed, base.num_images) == ("a cat", "blurry", 42, 2)
    assert (base.num_inference_steps, base.guidance_scale, base.adapter_strength) == (1, 2.5, 0.75)
    assert not base.HasField("adapter")
    assert last.adapter.sha256 == trainer.completions[0].adapter.sha256
    assert hashlib.sha256(get_object(prepared.store, last.adapter)).hexdigest() == last.adapter.sha256


def test_previews_and_scores_become_events(prepared: Any, work: Work, serve_sampler: Any) -> None:
    validation = {**VALIDATION, "preview_steps": 5, "clip_score": True, "unconditional": True, "resolutions": ["64x64"]}
    sampler, trainer = QuickSampler(), prepared.trainer(name="job-scored", validation=validation)
    with serve_sampler(sampler) as address:
        assert work(trainer, sampler=address) == 0
    previews = [(one.step, one.prompt_name, one.sampling_step) for one in trainer.of_kind("validation_preview")]
    assert previews == [(step, name, 1) for step in (0, 3, 6) for name in ("unconditional", "cat", "dog")]
    assert trainer.of_kind("validation_preview")[0].image == PREVIEW
    assert [image.clip_score for image in trainer.of_kind("validation_image")] == [20.0, 21.0] * 9
    scores = [(one.step, one.num_pictures, one.mean) for one in trainer.of_kind("validation_scores")]
    assert scores == [(0, 6, 20.5), (3, 6, 20.5), (6, 6, 20.5)]
    assert trainer.notices().count("PREVIEWS_LOST") == 1  # once for the job, not for each picture


def test_a_sampler_that_cannot_score_draws_all_the_same(prepared: Any, work: Work, serve_sampler: Any) -> None:
    sampler = QuickSampler()
    sampler.has_clip_model = False
    trainer = prepared.trainer(name="job-unscored", validation={**VALIDATION, "clip_score": True})
    with serve_sampler(sampler) as address:
        assert work(trainer, sampler=address) == 0
    assert len(trainer.of_kind("validation_image")) == 3 * 8
    assert trainer.of_kind("validation_scores") == []
    assert trainer.notices().count("CLIP_SCORE_LOST") == 1
    assert sum(request.clip_score for request in sampler.requests) == 1


def test_the_base_model_is_not_drawn_where_the_job_does_not_want_it(
    prepared: Any, work: Work, serve_sampler: Any
) -> None:
    validation = {**VALIDATION, "disable_benchmark": True, "every_steps": 0}
    sampler, trainer = QuickSampler(), prepared.trainer(name="job-nobase", validation=validation)
    with serve_sampler(sampler) as address:
        work(trainer, sampler=address)
    assert {image.step for image in trainer.of_kind("validation_image")} == {6}


def test_a_sampler_that_comes_late_draws_everything(
    prepared: Any, work: Work, loop_thread: Any, free_port: Callable[[], int]
) -> None:
    sampler, trainer, port = QuickSampler(), prepared.trainer(name="job-late", validation=VALIDATION), free_port()
    starting: list[asyncio.Task[Any]] = []

    def start_late(event: TrainingJobEvent) -> None:
        if event.step.step == 6:
            starting.append(asyncio.create_task(loop_thread.serve(_served(sampler), port)))

    trainer.on_event = start_late
    assert work(trainer, sampler=f"127.0.0.1:{port}") == 0
    assert {image.step for image in trainer.of_kind("validation_image")} == {0, 3, 6}
    assert trainer.notices().count("SAMPLER_UNAVAILABLE") == 1
    assert "VALIDATION_PICTURES_LOST" not in trainer.notices()


def test_a_sampler_at_work_may_be_silent_for_longer_than_one_that_is_away(
    prepared: Any, work: Work, serve_sampler: Any
) -> None:
    sampler = QuickSampler()
    sampler.may_answer.clear()
    last = {**VALIDATION, "disable_benchmark": True, "every_steps": 0, "resolutions": ["64x64"], "num_images": 1}
    trainer = prepared.trainer(name="job-silent", validation=last)

    def answer_late(event: TrainingJobEvent) -> None:
        if event.notice.reason == "ADAPTER_PROVEN":  # told before the worker waits for pictures
            asyncio.get_running_loop().call_later(1.0, sampler.may_answer.set)

    trainer.on_event = answer_late
    with serve_sampler(sampler) as address:
        assert work(trainer, sampler=address, validation_wait_seconds=0.1) == 0
    assert [image.prompt_name for image in trainer.of_kind("validation_image")] == ["cat", "dog"]
    assert trainer.notices() == ["ADAPTER_PROVEN"]


def test_a_dead_sampler_costs_pictures_and_not_the_job(prepared: Any, work: Work, free_port: Callable[[], int]) -> None:
    trainer = prepared.trainer(name="job-dead", validation=VALIDATION)
    assert work(trainer, sampler=f"127.0.0.1:{free_port()}", validation_wait_seconds=0.5) == 0
    assert trainer.completions[0].outcome == WORKER_OUTCOME_SUCCEEDED
    assert trainer.of_kind("validation_image") == []
    assert trainer.notices() == ["SAMPLER_UNAVAILABLE", "ADAPTER_PROVEN", "VALIDATION_PICTURES_LOST"]
    lost = trainer.of_kind("notice")[-1].message
    assert "0, 3, 6" in lost


def test_what_the_sampler_refuses_is_told_and_not_asked_again(prepared: Any, work: Work, serve_sampler: Any) -> None:
    sampler = QuickSampler()
    sampler.refuses = True
    trainer = prepared.trainer(name="job-refused", validation=VALIDATION)
    with serve_sampler(sampler) as address:
        assert work(trainer, sampler=address) == 0
    assert trainer.notices().count("VALIDATION_REFUSED") == len(sampler.requests) == 3 * 4
    assert trainer.completions[0].outcome == WORKER_OUTCOME_SUCCEEDED


def test_pictures_that_a_worker_did_not_get_are_asked_for_by_the_next_one(
    prepared: Any, work: Work, serve_sampler: Any, free_port: Callable[[], int]
) -> None:
    trainer = prepared.trainer(name="job-handed-on", validation=VALIDATION)

    def stop(event: TrainingJobEvent) -> None:
        trainer.should_stop = trainer.should_stop or event.step.step >= 3

    trainer.on_event = stop
    work(trainer, sampler=f"127.0.0.1:{free_port()}")
    assert trainer.completions[0].outcome == WORKER_OUTCOME_STOPPED
    trainer.should_stop, trainer.on_event = False, lambda _: None
    key = checkpoint_manifest_key("job-handed-on", trainer.of_kind("checkpoint")[-1].step)
    trainer.checkpoint = ObjectRef(uri=prepared.store.uri(key))
    sampler = QuickSampler()
    with serve_sampler(sampler) as address:
        work(trainer, sampler=address)
    assert {image.step for image in trainer.of_kind("validation_image")} == {0, 3, 6}
