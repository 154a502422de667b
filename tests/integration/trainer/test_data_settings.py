"""What a job says of its datasets, from the job file to the manifest that the worker reads."""

import json
from typing import Any

from reverie.training.v1 import job_pb2, training_pb2
from reverie_trainer.jobs.preparing.epochs import StepRange
from reverie_trainer.jobs.spec import JobSpec, spec_from_proto
from reverie_trainer.worker.samples import PreparedData, read_manifest
from reverie_trainer.worker.schedule import Schedule

CATS = [("512x512 a", ["a cat"]), ("640x448 b", ["a red cat"]), ("640x448 c", ["a cat"])]
DATASET = job_pb2.DatasetSpec


def prepared(trainer: Any, dataset: str) -> PreparedData:
    """The manifest that holds a dataset."""
    for info in trainer.store.list("v1/prepared/"):
        body = trainer.store.get(info.key)
        if any(entry["dataset"] == dataset for entry in json.loads(body)["datasets"]):
            return read_manifest(body)
    raise AssertionError(dataset)


async def train(trainer: Any, make_spec: Any, *datasets: job_pb2.DatasetSpec, **fields: Any) -> Any:
    """Train a job of several datasets to its end."""
    spec = make_spec(datasets[0].dataset)
    del spec.datasets[:]
    spec.datasets.extend(datasets)
    spec.MergeFrom(job_pb2.TrainingJobSpec(**fields))
    return await trainer.finish((await trainer.submit(spec)).job_id)


async def add_masked(trainer: Any, name: str, samples: list[tuple[str, str | None]]) -> None:
    await trainer.datasets.CreateDataset(training_pb2.CreateDatasetRequest(name=name))
    messages = [
        training_pb2.Sample(
            name=f"{index}.png",
            image=trainer.put_image(body),
            captions=["a cat"],
            mask=None if mask is None else trainer.put_image(mask),
        )
        for index, (body, mask) in enumerate(samples)
    ]
    await trainer.datasets.AddSamples(iter([training_pb2.AddSamplesRequest(dataset=name, samples=messages)]))


async def test_one_dataset_in_two_sizes_one_after_the_other(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("two-sizes", CATS)
    sizes = (
        DATASET(dataset="two-sizes", resolution=128, end_step=2),
        DATASET(dataset="two-sizes", resolution=256, start_step=3, probability=2.0, timestep_sampling_offset=0.5),
    )
    job = await train(trainer, make_spec, *sizes)
    assert job.state == job_pb2.TRAINING_JOB_STATE_SUCCEEDED
    assert job.preparation.num_images == 6
    data = prepared(trainer, "two-sizes")
    assert [source.steps for source in data.sources] == [StepRange(first=1, last=2), StepRange(first=3)]
    assert [source.timestep_sampling_offset for source in data.sources] == [0.0, 0.5]
    schedule = Schedule(data.schedule(_spec(job)), seed=1, batch_size=1)
    shown = [data.samples[schedule.micro_batches(step)[0][0].sample] for step in range(1, 6)]
    assert [sample.source for sample in shown] == [0, 0, 1, 1, 1]
    assert {sample.width * sample.height <= 128 * 128 for sample in shown[:2]} == {True}
    assert {sample.width * sample.height > 128 * 128 for sample in shown[2:]} == {True}


async def test_roles_are_kept_apart(trainer: Any, make_spec: Any) -> None:
    for name in ("subject", "others", "held-out"):
        await trainer.add_dataset(name, [(f"512x512 {name} {index}", [name]) for index in range(2)])
    job = await train(
        trainer,
        make_spec,
        DATASET(dataset="subject", repeats=2),
        DATASET(dataset="others", role="regularisation"),
        DATASET(dataset="held-out", role="evaluation"),
        evaluation=job_pb2.TrainingJobSpec().evaluation,
    )
    # What is only measured is in no epoch and in no bucket of the report.
    assert (job.preparation.num_images, job.preparation.samples_per_epoch) == (4, 8)
    assert sum(bucket.num_images for bucket in job.preparation.buckets) == 4
    data = prepared(trainer, "held-out")
    assert [source.is_regularisation for source in data.sources] == [False, True, False]
    assert len(data.evaluation_samples("held-out")) == 2
    trained = {member for item in data.schedule(_spec(job)) for group in item.groups for member in group.members}
    assert {data.samples[member].dataset for member in trained} == {"subject", "others"}


async def test_epochs_become_steps_before_the_worker_starts(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("epochs", CATS)
    spec = make_spec("epochs")
    spec.datasets[0].repeats = 1
    spec.optimization.max_steps = 0
    spec.optimization.num_epochs = 2
    spec.optimization.gradient_accumulation_steps = 2
    checked = await trainer.training.CheckTrainingJob(training_pb2.CheckTrainingJobRequest(spec=spec))
    assert "2 epochs = 6 steps" in "\n".join(checked.plan)
    assert checked.spec.optimization.max_steps == 6
    job = await trainer.finish((await trainer.submit(spec)).job_id)
    assert (job.spec.optimization.max_steps, job.spec.optimization.num_epochs) == (6, 2)


async def test_pictures_that_are_left_out_are_told_with_the_reason(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("sizes", [*CATS, ("100x100 s", ["a cat"]), ("900x300 w", ["a cat"])])
    choice = DATASET(dataset="sizes", minimum_image_size=256, maximum_aspect_ratio=2.5)
    job = await train(trainer, make_spec, choice)
    messages = {item.sample: item.message for item in job.preparation.rejected}
    assert job.preparation.num_images == 3
    assert "below minimum_image_size 256" in messages["003.png"]
    assert "above maximum_aspect_ratio 2.5" in messages["004.png"]


async def test_so_many_samples_as_asked_for_are_encoded(trainer: Any, make_spec: Any, neighbours: Any) -> None:
    await trainer.add_dataset("subset", [(f"512x512 {index}", [f"cat {index}"]) for index in range(6)])
    job = await train(trainer, make_spec, DATASET(dataset="subset", max_num_samples=2))
    assert job.preparation.num_images == 2
    assert len(neighbours.vae.plans) == 2
    assert not job.preparation.rejected


async def test_captions_come_from_where_they_are_asked_for(trainer: Any, make_spec: Any, fake_encoder: Any) -> None:
    await trainer.add_dataset("texts", [("512x512 t", ["red, round, big"])])
    wanted = {
        "filename": DATASET(dataset="texts", caption_strategy="filename"),
        "list": DATASET(dataset="texts", caption_strategy="instanceprompt", instance_prompts=["sks", "zorp"]),
        "both": DATASET(dataset="texts", instance_prompt="sks", prepend_instance_prompt=True),
    }
    encoded = {}
    for name, choice in wanted.items():
        fake_encoder.encoded.clear()
        await train(trainer, make_spec, choice)
        encoded[name] = sorted(set(fake_encoder.encoded) - {""})
    assert encoded == {"filename": ["000"], "list": ["sks", "zorp"], "both": ["sks red, round, big"]}


async def test_shuffled_captions_are_all_encoded_beforehand(trainer: Any, make_spec: Any, fake_encoder: Any) -> None:
    await trainer.add_dataset("parts", [("512x512 p", ["a, b, c, d, e"])])
    await train(trainer, make_spec, DATASET(dataset="parts", caption_shuffle=True))
    encoded = set(fake_encoder.encoded) - {""}
    assert len(encoded) == 8
    assert {tuple(sorted(text.split(", "))) for text in encoded} == {("a", "b", "c", "d", "e")}
    orders = prepared(trainer, "parts").samples[0].captions[0]
    assert {caption.text for caption in orders} == encoded


async def test_masks_are_encoded_with_the_plans_of_their_images(trainer: Any, make_spec: Any, neighbours: Any) -> None:
    await add_masked(trainer, "masked", [("900x300 m", "450x150 mask"), ("512x512 m", None), ("512x512 n", "broken")])
    job = await train(trainer, make_spec, DATASET(dataset="masked", mask_type="mask", crop=True))
    plans = {plan.image.size_bytes: plan for plan in neighbours.vae.mask_plans}
    image = next(plan for plan in neighbours.vae.plans if plan.crop_left)
    mask = plans[len("450x150 mask")]
    mask.image.CopyFrom(image.image)
    assert mask == image
    assert [item.message for item in job.preparation.rejected] == ["its mask: the file ends early; export it again"]
    samples = {sample.name: sample.mask for sample in prepared(trainer, "masked").samples}
    assert (samples["0.png"] is not None, samples["1.png"]) == (True, None)


async def test_masks_are_not_asked_for_without_need(trainer: Any, make_spec: Any, neighbours: Any) -> None:
    await add_masked(trainer, "unmasked", [("512x512 u", "512x512 mask")])
    await train(trainer, make_spec, DATASET(dataset="unmasked"))
    assert neighbours.vae.mask_plans == []


async def test_a_dataset_without_masks_is_refused_where_masks_are_wanted(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("maskless", CATS)
    spec = make_spec("maskless")
    spec.datasets[0].mask_type = "segmentation"
    checked = await trainer.training.CheckTrainingJob(training_pb2.CheckTrainingJobRequest(spec=spec))
    assert [violation.field for violation in checked.violations] == ["datasets[0].mask_type"]
    assert "--masks FOLDER" in checked.violations[0].description


async def test_oversubscription_trains_on_buckets_that_are_too_small(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("small", CATS)
    batch = job_pb2.OptimizationSpec(batch_size=3)
    failed = await train(trainer, make_spec, DATASET(dataset="small"), optimization=batch)
    assert failed.failure.reason == "ZERO_USABLE_BATCHES"
    assert "allow_dataset_oversubscription" in failed.failure.remedy
    job = await train(
        trainer, make_spec, DATASET(dataset="small"), optimization=batch, allow_dataset_oversubscription=True
    )
    assert job.state == job_pb2.TRAINING_JOB_STATE_SUCCEEDED
    # One image three times, two images twice.
    assert job.preparation.samples_per_epoch == 7


def _spec(job: job_pb2.TrainingJob) -> JobSpec:
    return spec_from_proto(job.spec)
