"""CheckTrainingJob: the plan and the estimate, or every violation, and nothing changed."""

from typing import Any

from reverie.training.v1 import job_pb2, training_pb2

CATS = [("512x512 a", ["a cat"]), ("640x448 b", ["a red cat"]), ("640x448 c", ["a cat"])]


async def check(trainer: Any, spec: job_pb2.TrainingJobSpec) -> training_pb2.CheckTrainingJobResponse:
    request = training_pb2.CheckTrainingJobRequest(spec=spec)
    response: training_pb2.CheckTrainingJobResponse = await trainer.training.CheckTrainingJob(request)
    return response


async def test_plan_and_estimate_of_a_right_job(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("plan", CATS)
    spec = make_spec("plan", optimization=job_pb2.OptimizationSpec(max_steps=30))
    spec.datasets[0].repeats = 1
    checked = await check(trainer, spec)
    assert not checked.violations
    assert checked.spec.optimization.learning_rate == 1e-4
    assert checked.estimate.steps_per_epoch == 6
    # Three prompts (the empty one too): T5, three Llama layers, pooled in bf16; and float32 moments of three images.
    text = 3 * 2 * (128 * 48 + 3 * 128 * 64 + 80)
    latents = (256 * 256 + 2 * 320 * 192) // 64 * 2 * 16 * 4
    assert checked.estimate.storage_bytes == text + latents
    assert sum(part.size_bytes for part in checked.estimate.storage_parts) == text + latents
    assert 0.7e9 < checked.estimate.worker_memory_bytes < 2e9
    assert sum(part.size_bytes for part in checked.estimate.worker_memory) == checked.estimate.worker_memory_bytes
    assert [part.name for part in checked.estimate.encoder_memory] == [
        "clip_l (no_change)",
        "clip_g (no_change)",
        "t5 (no_change)",
        "llama (no_change)",
    ]
    exact, compact, on_demand = checked.estimate.storage
    assert exact.size_bytes == on_demand.size_bytes == text + latents
    assert compact.size_bytes == latents + 3 * (int((128 * 48 + 3 * 128 * 64) * 17 / 16) + 2 * 80)
    assert not checked.estimate.HasField("training_time")
    plan = "\n".join(checked.plan)
    assert "bucket 320x192 of plan: 2 images" in plan
    assert "LoKr on 24 modules" in plan
    assert "6 steps in an epoch, 5.0 epochs" in plan


async def test_nothing_is_changed_by_a_check(trainer: Any, make_spec: Any, fake_encoder: Any) -> None:
    await trainer.add_dataset("unchanged", CATS)
    await check(trainer, make_spec("unchanged"))
    assert fake_encoder.encoded == []
    assert not (await trainer.training.ListTrainingJobs(training_pb2.ListTrainingJobsRequest())).jobs


async def test_violations_come_without_an_estimate(trainer: Any, make_spec: Any) -> None:
    checked = await check(trainer, make_spec("nowhere", name="Bad"))
    assert [violation.field for violation in checked.violations] == ["name", "datasets[0].dataset"]
    assert not checked.HasField("estimate")
    assert not checked.plan


async def test_time_is_that_of_the_newest_comparable_job(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("time", CATS)
    await trainer.finish((await trainer.submit(make_spec("time", "steps=3"))).job_id)
    spec = make_spec("time", optimization=job_pb2.OptimizationSpec(max_steps=100))
    assert (await check(trainer, spec)).estimate.training_time.seconds == 50
    spec.optimization.batch_size = 2
    spec.datasets[0].repeats = 9
    assert not (await check(trainer, spec)).estimate.HasField("training_time")


async def test_check_answers_while_the_services_are_away(start_trainer: Any, make_spec: Any, free_port: Any) -> None:
    trainer = await start_trainer(encoders=(f"127.0.0.1:{free_port()}",), vae=f"127.0.0.1:{free_port()}")
    await trainer.add_dataset("alone", CATS)
    checked = await check(trainer, make_spec("alone"))
    assert not checked.violations
    assert checked.estimate.steps_per_epoch == 3
    assert any("when the images have been opened" in line for line in checked.plan)
    assert any("no encoder service answers" in line for line in checked.plan)


async def test_what_is_not_as_asked_is_told_at_check_and_in_the_job(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("told", CATS)
    spec = make_spec("told")
    spec.datasets[0].resolution = 512
    spec.adapter.lokr.apply_preset.target_module.extend(["Attention", "FeedFoward"])
    plan = "\n".join((await check(trainer, spec)).plan)
    assert "WARNING: dataset told: resolution 512 is above this model's canvas of 65536 pixels" in plan
    assert "WARNING: adapter: nothing matches FeedFoward" in plan
    events = await trainer.watch((await trainer.submit(spec)).job_id)
    assert [event.notice.reason for event in events if event.HasField("notice")] == [
        "RESOLUTION_ABOVE_CANVAS",
        "ADAPTER_PARTLY_UNMATCHED",
    ]


async def test_plan_warns_of_broken_images_and_of_buckets_that_fill_no_step(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("warnings", [*CATS, ("broken", ["a cat"])])
    checked = await check(trainer, make_spec("warnings", optimization=job_pb2.OptimizationSpec(batch_size=2)))
    plan = "\n".join(checked.plan)
    assert "003.png cannot be used: the file ends early" in plan
    assert "Minimum repeats required: 1" in plan


async def test_plan_says_when_a_dataset_has_nothing_left(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("all-small", CATS)
    spec = make_spec("all-small")
    spec.datasets[0].minimum_image_size = 4000
    checked = await check(trainer, spec)
    assert not checked.violations
    assert "WARNING: no images detected in dataset 'all-small'; all 3 images were rejected" in checked.plan


async def test_a_selection_that_excludes_everything_says_so(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("excluded", CATS)
    spec = make_spec("excluded")
    spec.adapter.lokr.apply_preset.exclude_name.append("*")
    found = {violation.field: violation.description for violation in (await check(trainer, spec)).violations}
    assert "take something off exclude_name ['*']" in found["adapter.lokr.apply_preset"]
