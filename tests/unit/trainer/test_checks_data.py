"""Everything that can be wrong with the datasets of a job: the field, the value, the limit and the remedy."""

import pytest
from reverie_trainer.jobs.checks import check_spec
from reverie_trainer.jobs.spec import CropAspect, DatasetChoice, Evaluation, JobSpec, LokrAdapter, Optimization


def found(*datasets: DatasetChoice, **changes: object) -> dict[str, str]:
    fields: dict[str, object] = {
        "name": "cats",
        "datasets": datasets,
        "adapter": LokrAdapter(),
        "optimization": Optimization(max_steps=100),
        **changes,
    }
    return {item.field: item.description for item in check_spec(JobSpec(**fields))}  # type: ignore[arg-type]


def one(**changes: object) -> dict[str, str]:
    return found(DatasetChoice(**{"dataset": "cats", **changes}))  # type: ignore[arg-type]


ASPECTS = (CropAspect(aspect=1.0, weight=0.25), CropAspect(aspect=1.5, weight=0.75))


@pytest.mark.parametrize(
    "changes",
    [
        {"resolution": 0.5, "resolution_type": "area", "minimum_image_size": 0.25},
        {"resolution": 512, "resolution_type": "pixel"},
        # The reference configuration.
        {"minimum_image_size": 1024, "maximum_image_size": 1024, "target_downsample_size": 1024, "crop": True},
        {"crop": True, "crop_aspect": "preserve", "crop_style": "random"},
        {"crop": True, "crop_aspect": "random", "crop_aspect_buckets": ASPECTS},
        {"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": (CropAspect(aspect=1.5),)},
        {"minimum_aspect_ratio": 0.5, "maximum_aspect_ratio": 2.0, "max_upscale_threshold": 2.0},
        {"max_num_samples": 10, "probability": 0.5, "repeats": 1000},
        {"caption_strategy": "filename", "instance_prompt": "sks", "prepend_instance_prompt": True},
        {"caption_strategy": "instanceprompt", "instance_prompts": ("a", "b"), "caption_shuffle": True},
        {"instance_prompt": "sks", "prepend_instance_prompt": True},
        {"mask_type": "segmentation", "timestep_sampling_offset": -0.5},
    ],
)
def test_what_has_a_meaning_is_accepted(changes: dict[str, object]) -> None:
    assert one(**changes) == {}


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"resolution": 20, "resolution_type": "area"}, "resolution", "outside 0.004 to 16.8 megapixels"),
        ({"minimum_image_size": 1}, "minimum_image_size", "outside 64 to 4096 pixels"),
        ({"maximum_image_size": 2048}, "target_downsample_size", "maximum_image_size has no meaning without it"),
        ({"target_downsample_size": 2048}, "maximum_image_size", "target_downsample_size has no meaning without it"),
        (
            {"maximum_image_size": 1024, "target_downsample_size": 2048},
            "target_downsample_size",
            "2048 is above maximum_image_size 1024",
        ),
        (
            {"maximum_image_size": 1024, "target_downsample_size": 512},
            "target_downsample_size",
            "512 is below resolution 1024",
        ),
        ({"minimum_aspect_ratio": 2, "maximum_aspect_ratio": 1}, "minimum_aspect_ratio", "above maximum_aspect_ratio"),
        ({"max_upscale_threshold": 0.5}, "max_upscale_threshold", "at least 1"),
        ({"crop_style": "face"}, "crop_style", "needs a face detector"),
        ({"crop_aspect": "preserve"}, "crop_aspect", "set crop: true"),
        ({"crop": True, "crop_aspect": "tall"}, "crop_aspect", "square, preserve, random, closest"),
        ({"crop": True, "crop_aspect": "random"}, "crop_aspect_buckets", "chooses from it"),
        ({"crop": True, "crop_aspect_buckets": ASPECTS}, "crop_aspect_buckets", "does not read it"),
        (
            {"crop": True, "crop_aspect": "random", "crop_aspect_buckets": (CropAspect(aspect=1, weight=0.5),)},
            "crop_aspect_buckets",
            "sum to 0.5",
        ),
        (
            {"crop": True, "crop_aspect": "random", "crop_aspect_buckets": (*ASPECTS, CropAspect(aspect=2))},
            "crop_aspect_buckets",
            "2 of 3 aspects have a weight",
        ),
        (
            {"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": ASPECTS},
            "crop_aspect_buckets",
            "no meaning with crop_aspect 'closest'",
        ),
        (
            {"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": (CropAspect(aspect=20),)},
            "crop_aspect_buckets[0].aspect",
            "outside 0.1 to 10",
        ),
        ({"caption_strategy": "textfile"}, "caption_strategy", "captions, filename, instanceprompt"),
        ({"caption_strategy": "instanceprompt"}, "instance_prompt", "missing"),
        ({"prepend_instance_prompt": True}, "instance_prompt", "missing"),
        (
            {"caption_strategy": "instanceprompt", "instance_prompt": "a", "prepend_instance_prompt": True},
            "prepend_instance_prompt",
            "no meaning",
        ),
        ({"caption_strategy": "filename", "instance_prompt": "a"}, "instance_prompt", "it would do nothing"),
        ({"caption_strategy": "filename", "instance_prompts": ("a", "b")}, "instance_prompts", "it would do nothing"),
        ({"instance_prompt": "a", "instance_prompts": ("b",)}, "instance_prompts", "give one of both"),
        ({"instance_prompts": (" ",)}, "instance_prompts[0]", "blank"),
        ({"probability": 0.0}, "probability", "above 0"),
        ({"role": "eval"}, "role", "did you mean"),
        ({"mask_type": "alpha"}, "mask_type", "none, mask, segmentation"),
        ({"timestep_sampling_offset": 11.0}, "timestep_sampling_offset", "at most 10"),
        ({"start_step": 5, "end_step": 4}, "end_step", "before start_step 5"),
    ],
)
def test_what_has_none_is_refused(changes: dict[str, object], field: str, words: str) -> None:
    violations = one(**changes)
    assert list(violations) == [f"datasets[0].{field}"]
    assert words in violations[f"datasets[0].{field}"]


def test_face_says_what_to_do_instead() -> None:
    assert "use center" in one(crop_style="face")["datasets[0].crop_style"]


def test_there_must_be_something_to_learn() -> None:
    others = DatasetChoice(dataset="others", role="regularisation")
    held_out = DatasetChoice(dataset="held-out", role="evaluation")
    assert "for regularisation, where a new adapter's loss is 0" in found(others)["datasets"]
    assert "for evaluation; give one with role train" in found(held_out, evaluation=Evaluation())["datasets"]
    assert "give one with role train" in found(others, held_out, evaluation=Evaluation())["datasets"]
    assert found(DatasetChoice(dataset="cats"), others) == {}


def test_steps_without_a_dataset_are_refused() -> None:
    first = DatasetChoice(dataset="cats", end_step=40)
    assert "steps 41 to 100" in found(first)["datasets"]
    assert "steps 41 to 59" in found(first, DatasetChoice(dataset="cats", start_step=60))["datasets"]
    assert found(first, DatasetChoice(dataset="cats", start_step=41)) == {}
    late = DatasetChoice(dataset="cats", start_step=10)
    assert "steps 1 to 9" in found(late)["datasets"]


def test_epochs_need_a_dataset_that_does_not_end() -> None:
    epochs = Optimization(num_epochs=3)
    assert found(DatasetChoice(dataset="cats"), optimization=epochs) == {}
    ended = found(DatasetChoice(dataset="cats", end_step=40), optimization=epochs)
    assert "the steps from 41 on" in ended["datasets"]


@pytest.mark.parametrize(
    ("optimization", "field", "words"),
    [
        (Optimization(), "optimization.max_steps", "0 is outside 1 to 1000000"),
        (Optimization(max_steps=3, num_epochs=3), "optimization.max_steps", "num_epochs 3 is given too"),
        (Optimization(num_epochs=1_000_000), "optimization.num_epochs", "outside 1 to 100000"),
    ],
)
def test_a_job_is_as_long_as_one_field_says(optimization: Optimization, field: str, words: str) -> None:
    violations = found(DatasetChoice(dataset="cats"), optimization=optimization)
    assert list(violations) == [field]
    assert words in violations[field]


def test_a_job_of_evaluation_alone_is_refused() -> None:
    violations = found(DatasetChoice(dataset="cats", role="evaluation"), evaluation=Evaluation())
    assert "every dataset is for evaluation" in violations["datasets"]


def test_evaluation_has_no_steps() -> None:
    held_out = DatasetChoice(dataset="held-out", role="evaluation", start_step=5)
    violations = found(DatasetChoice(dataset="cats"), held_out, evaluation=Evaluation())
    assert "leave start_step and end_step out" in violations["datasets[1].role"]


def test_the_jobs_own_data_settings_are_checked() -> None:
    violations = found(DatasetChoice(dataset="cats"), dataset_sampling="even", aspect_bucket_rounding=0)
    assert "auto, uniform" in violations["dataset_sampling"]
    assert "outside 1 to 9 decimals" in violations["aspect_bucket_rounding"]
