"""Preparation with services that refuse, come and go, and share the work."""

from typing import Any

import pytest
from reverie.encoder.v1 import encoder_pb2
from reverie.training.v1 import job_pb2, training_pb2
from reverie_common.errors import InvalidArgumentError, ResourceExhaustedError, UnavailableError

CATS = [("512x512 a", ["a cat"]), ("640x448 b", ["a red cat", "a cat on a mat"]), ("640x448 c", ["a cat"])]


def notices(events: list[job_pb2.TrainingJobEvent]) -> list[str]:
    return [event.notice.reason for event in events if event.HasField("notice")]


async def run(trainer: Any, spec: job_pb2.TrainingJobSpec) -> list[job_pb2.TrainingJobEvent]:
    events: list[job_pb2.TrainingJobEvent] = await trainer.watch((await trainer.submit(spec)).job_id)
    return events


async def test_broken_images_are_set_aside_with_their_reason(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("broken", [*CATS, ("broken", ["a cat"])])
    events = await run(trainer, make_spec("broken"))
    report = events[-1].snapshot.preparation
    assert report.num_images == 3
    assert [(item.sample, item.message) for item in report.rejected] == [
        ("003.png", "the file ends early; export it again")
    ]
    assert notices(events) == ["IMAGES_REJECTED"]


async def test_dataset_of_broken_images_fails_the_job_with_the_remedy(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("all-broken", [("broken 1", ["a cat"]), ("broken 2", ["a cat"])])
    failure = (await run(trainer, make_spec("all-broken")))[-1].snapshot.failure
    assert failure.reason == "DATASET_EMPTY"
    assert "no images detected in dataset 'all-broken'; all 2 images were rejected" in failure.message
    assert "export it again" in failure.message
    assert "reverie dataset scan" in failure.remedy


async def test_bucket_that_fills_no_step_fails_the_job_with_a_table(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("underfilled", CATS)
    spec = make_spec("underfilled", optimization=job_pb2.OptimizationSpec(batch_size=3))
    failure = (await run(trainer, spec))[-1].snapshot.failure
    assert failure.reason == "ZERO_USABLE_BATCHES"
    assert "underfilled | 256x256 | 1 | 0 | 1 | 2" in failure.message
    assert "Minimum repeats required: 2" in failure.message
    assert "crop" in failure.remedy


async def test_known_samples_are_checked_against_the_new_batch(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("known", CATS)
    await run(trainer, make_spec("known"))
    spec = make_spec("known", optimization=job_pb2.OptimizationSpec(gradient_accumulation_steps=3))
    assert (await run(trainer, spec))[-1].snapshot.failure.reason == "ZERO_USABLE_BATCHES"


async def test_cut_captions_are_reported(trainer: Any, make_spec: Any) -> None:
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    await trainer.add_dataset("long", [("512x512 d", [long])])
    events = await run(trainer, make_spec("long"))
    truncated = events[-1].snapshot.preparation.truncated
    assert {item.encoder for item in truncated} == {"clip_l", "clip_g", "t5", "llama"}
    assert (truncated[0].sample, truncated[0].num_tokens, truncated[0].max_length) == ("000.png", 14, 12)
    assert truncated[0].dropped_text == "thirteen fourteen"
    assert notices(events) == ["CAPTIONS_TRUNCATED"]


async def test_progress_is_told_for_each_stage_from_nothing_to_all(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("progress", CATS)
    events = await run(trainer, make_spec("progress"))
    progress = [event.preparation for event in events if event.HasField("preparation")]
    done: dict[str, list[int]] = {}
    for item in progress:
        done.setdefault(item.stage, []).append(item.num_done)
    assert done == {
        "inspect": [0, 1, 2, 3],
        "encode_prompts": [0, 1, 2, 3, 4],
        "encode_images": [0, 1, 2, 3],
    }


async def test_progress_is_throttled(start_trainer: Any, make_spec: Any) -> None:
    trainer = await start_trainer(progress_seconds=60.0)
    await trainer.add_dataset("throttled", CATS)
    events = await run(trainer, make_spec("throttled"))
    inspected = [event.preparation.num_done for event in events if event.preparation.stage == "inspect"]
    assert inspected == [0, 3]


async def test_instance_prompt_stands_in_for_missing_captions(trainer: Any, make_spec: Any, fake_encoder: Any) -> None:
    await trainer.add_dataset("instance", [("512x512 e", []), ("512x512 f", ["own"])])
    spec = make_spec("instance")
    spec.datasets[0].instance_prompt = "a sks cat"
    await run(trainer, spec)
    assert sorted(set(fake_encoder.encoded)) == ["", "a sks cat", "own"]


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError("loading", reason="STILL_LOADING"),
        ResourceExhaustedError("queue is full", reason="QUEUE_FULL", retry_after_seconds=0.1),
    ],
)
async def test_service_that_is_away_for_a_moment_is_asked_again(
    trainer: Any, make_spec: Any, fake_encoder: Any, error: Any
) -> None:
    # More than the channel repeats by itself, and in the middle of an answer.
    fake_encoder.errors = [error] * 6
    fake_encoder.answers_before_error = 1
    await trainer.add_dataset(f"moment-{error.reason.lower().replace('_', '-')}", CATS)
    events = await run(trainer, make_spec(f"moment-{error.reason.lower().replace('_', '-')}"))
    assert events[-1].snapshot.state == job_pb2.TRAINING_JOB_STATE_SUCCEEDED
    assert sorted(fake_encoder.encoded) == ["", "a cat", "a cat on a mat", "a red cat"]


async def test_service_that_stays_away_fails_the_job(start_trainer: Any, make_spec: Any, free_port: Any) -> None:
    address = f"127.0.0.1:{free_port()}"
    trainer = await start_trainer(encoders=(address,), patience_seconds=1.0)
    await trainer.add_dataset("away", CATS)
    failure = (await run(trainer, make_spec("away")))[-1].snapshot.failure
    assert failure.reason == "UNAVAILABLE"
    assert f"the encoder service at {address}" in failure.message
    assert "resume" in failure.remedy


async def test_refusal_by_a_service_fails_the_job_at_once(trainer: Any, make_spec: Any, fake_encoder: Any) -> None:
    fake_encoder.errors = [InvalidArgumentError("prompts[1] is not what I read", reason="BAD_PROMPT")]
    await trainer.add_dataset("refused", CATS)
    failure = (await run(trainer, make_spec("refused")))[-1].snapshot.failure
    assert (failure.reason, failure.message) == ("BAD_PROMPT", "prompts[1] is not what I read")


async def test_encoders_of_several_addresses_share_the_work(
    start_trainer: Any, make_spec: Any, fake_encoder: Any, serve_encoder: Any, neighbours: Any
) -> None:
    fake_encoder.encoders = (encoder_pb2.ENCODER_CLIP_L, encoder_pb2.ENCODER_CLIP_G)
    other, address = await serve_encoder(
        (encoder_pb2.ENCODER_CLIP_G, encoder_pb2.ENCODER_T5, encoder_pb2.ENCODER_LLAMA)
    )
    trainer = await start_trainer(encoders=(neighbours.encoder_server.target, address))
    await trainer.add_dataset("shared", CATS)
    final = (await run(trainer, make_spec("shared")))[-1].snapshot
    assert final.state == job_pb2.TRAINING_JOB_STATE_SUCCEEDED
    assert sorted(fake_encoder.encoded) == sorted(other.encoded) == ["", "a cat", "a cat on a mat", "a red cat"]


async def test_encoder_that_is_nowhere_fails_the_job(trainer: Any, make_spec: Any, fake_encoder: Any) -> None:
    fake_encoder.encoders = (encoder_pb2.ENCODER_CLIP_L, encoder_pb2.ENCODER_LLAMA)
    await trainer.add_dataset("missing", CATS)
    failure = (await run(trainer, make_spec("missing")))[-1].snapshot.failure
    assert failure.reason == "ENCODER_MISSING"
    assert "clip_g, t5" in failure.message
    assert "--encoders clip_g,t5" in failure.remedy


async def test_preparation_is_cancelled_at_once(start_trainer: Any, make_spec: Any, free_port: Any) -> None:
    trainer = await start_trainer(vae=f"127.0.0.1:{free_port()}")
    await trainer.add_dataset("cancel", CATS)
    job = await trainer.submit(make_spec("cancel"))
    await trainer.until(job.job_id, lambda job: job.state == job_pb2.TRAINING_JOB_STATE_PREPARING)
    cancelled = await trainer.training.CancelTrainingJob(training_pb2.CancelTrainingJobRequest(job_id=job.job_id))
    assert cancelled.job.state == job_pb2.TRAINING_JOB_STATE_CANCELLED


async def test_renamed_and_added_images_encode_only_what_is_new(trainer: Any, make_spec: Any, neighbours: Any) -> None:
    await trainer.add_dataset("before", CATS)
    await run(trainer, make_spec("before"))
    await trainer.add_dataset("after", [*reversed(CATS), ("512x512 new", ["a dog"])])
    report = (await run(trainer, make_spec("after")))[-1].snapshot.preparation
    assert (report.num_images, report.num_images_cached) == (4, 3)
    assert (report.num_prompts, report.num_prompts_cached) == (5, 4)


async def test_canvas_of_the_checkpoint_bounds_the_plans(trainer: Any, make_spec: Any, neighbours: Any) -> None:
    await trainer.add_dataset("canvas", [("3000x2000 a", ["a cat"]), ("3000x3000 b", ["a cat"])])
    spec = make_spec("canvas")
    spec.datasets[0].resolution = 1024
    await run(trainer, spec)
    assert sorted((plan.width, plan.height) for plan in neighbours.vae.plans) == [(256, 256), (320, 192)]
