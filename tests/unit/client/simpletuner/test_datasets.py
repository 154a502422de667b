"""Entries of the dataset file: what they become, and how their pictures are brought."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reverie_client.job_text import job_text
from reverie_client.simpletuner import Imported, Outcome, ReportLine
from reverie_client.specs import parse_job_spec
from reverie_trainer.jobs.checks import check_spec
from reverie_trainer.jobs.spec import spec_from_proto

Bring = Callable[..., Imported]
LineOf = Callable[[Imported, str], ReportLine]

PHOTOS = {"id": "photos", "type": "local", "instance_data_dir": "photos", "caption_strategy": "textfile"}


def entry(**more: Any) -> dict[str, Any]:
    return {**PHOTOS, **more}


FIELDS: list[tuple[dict[str, Any], str, Any]] = [
    ({"repeats": "1000"}, "repeats", 1000),
    ({"probability": "0.5"}, "probability", 0.5),
    ({"resolution": 0.5, "resolution_type": "area"}, "resolution", 0.5),
    ({"resolution_type": "pixel"}, "resolution_type", "pixel"),
    ({"minimum_image_size": 512}, "minimum_image_size", 512),
    ({"maximum_image_size": 2048, "target_downsample_size": 1024}, "target_downsample_size", 1024),
    ({"minimum_aspect_ratio": 0.5}, "minimum_aspect_ratio", 0.5),
    ({"maximum_aspect_ratio": 2}, "maximum_aspect_ratio", 2),
    ({"max_upscale_threshold": 1.5}, "max_upscale_threshold", 1.5),
    ({"max_num_samples": 10}, "max_num_samples", 10),
    ({"crop": "true"}, "crop", True),
    ({"crop": True}, "crop_style", "random"),
    ({"crop": True, "crop_style": "centre"}, "crop_style", "center"),
    ({"crop": True, "crop_aspect": "preserve"}, "crop_aspect", "preserve"),
    (
        {"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": [1.0, {"aspect": 1.5}]},
        "crop_aspect_buckets",
        [{"aspect": 1.0}, {"aspect": 1.5}],
    ),
    ({"caption_strategy": "filename"}, "caption_strategy", "filename"),
    ({"caption_strategy": "instanceprompt", "instance_prompt": "a sks"}, "instance_prompt", "a sks"),
    ({"caption_strategy": "instanceprompt", "instance_prompt": ["a", "b"]}, "instance_prompts", ["a", "b"]),
    ({"only_instance_prompt": True, "instance_prompt": "a sks"}, "caption_strategy", "instanceprompt"),
    ({"prepend_instance_prompt": True, "instance_prompt": "a sks"}, "prepend_instance_prompt", True),
    ({"is_regularisation_data": "true"}, "role", "regularisation"),
    ({"dataset_type": "eval"}, "role", "evaluation"),
    ({"caption_shuffle": True}, "caption_shuffle", True),
    ({"start_step": 100}, "start_step", 100),
    ({"end_step": 200}, "end_step", 200),
    ({"timestep_sampling_offset": 0.5}, "timestep_sampling_offset", 0.5),
]


@pytest.mark.parametrize(("more", "field", "expected"), FIELDS, ids=str)
def test_fields_arrive(bring: Bring, more: dict[str, Any], field: str, expected: Any) -> None:
    imported = bring({"eval_steps_interval": 50}, datasets=[entry(**more)])
    assert imported.document["datasets"][0][field] == expected
    assert not imported.report.has_refusals
    violations = check_spec(spec_from_proto(parse_job_spec(job_text(imported.document, imported.comments))))
    # A job of nothing but evaluation, or of nothing for some steps, is refused as a whole.
    assert [found for found in violations if found.field != "datasets"] == []


REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"type": "webshart"}, "type", "local"),
    (
        {"type": "aws", "aws_bucket_name": "b", "caption_strategy": "parquet"},
        "caption_strategy",
        "textfile or filename",
    ),
    ({"type": "csv", "csv_file": "l.csv", "caption_strategy": "filename"}, "caption_strategy", "csv"),
    ({"caption_strategy": "huggingface"}, "caption_strategy", "textfile"),
    ({"conditioning_data": "nowhere"}, "conditioning_data", "conditioning_type"),
    ({"type": "aws", "aws_bucket_name": "b", "conditioning_data": "m"}, "conditioning_data", "local"),
    ({"dataset_type": "video"}, "dataset_type", "image"),
    ({"crop": True, "crop_style": "face"}, "crop_style", "center"),
    ({"caption_strategy": "tags"}, "caption_strategy", "textfile"),
    ({"caption_strategy": "instanceprompt"}, "caption_strategy", "instance_prompt"),
    ({"maximum_image_size": 2048}, "maximum_image_size", "target_downsample_size"),
    ({"maximum_image_size": 2048, "target_downsample_size": 512}, "target_downsample_size", "1024"),
    ({"max_upscale_threshold": 0.2}, "max_upscale_threshold", "1.2"),
    ({"caption_filter_list": ["x"]}, "caption_filter_list", "before uploading"),
    ({"start_epoch": 3}, "start_epoch", "start_step"),
    ({"train_batch_size": 4}, "train_batch_size", "config.json"),
    ({"resolution": 5}, "resolution", "64"),
    ({"repeat": 3}, "repeat", "repeats"),
]


@pytest.mark.parametrize(("more", "key", "reason"), REFUSALS, ids=str)
def test_what_does_not_work_is_refused(
    bring: Bring, line_of: LineOf, more: dict[str, Any], key: str, reason: str
) -> None:
    line = line_of(bring(datasets=[entry(**more)]), f"photos.{key}")
    assert line.outcome == "refused"
    assert reason in line.reason


def test_entries_fall_back_on_the_options_and_on_simpletuners_strategy(bring: Bring) -> None:
    plain = {"id": "photos", "type": "local", "instance_data_dir": "photos"}
    (dataset,) = bring({"resolution": 512, "minimum_image_size": 256, "crop": True}, datasets=[plain]).document[
        "datasets"
    ]
    assert dataset == {
        "dataset": "photos",
        "resolution": 512,
        "minimum_image_size": 256,
        "crop": True,
        "crop_style": "random",
        "caption_strategy": "filename",
    }


def test_a_fallback_that_cannot_be_used_is_refused(bring: Bring) -> None:
    imported = bring({"maximum_image_size": 2048}, datasets=[PHOTOS])
    assert [line.key for line in imported.report.of(Outcome.REFUSED)] == ["photos.maximum_image_size"]


def test_disabled_entries_and_caches_are_skipped_with_a_line_for_each_key(bring: Bring) -> None:
    imported = bring(
        datasets=[
            PHOTOS,
            {"id": "off", "type": "aws", "aws_secret_access_key": "hush", "disabled": "true"},
            {"id": "also-off", "type": "local", "disable": True},
            {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "x"},
            {"id": "latents", "type": "local", "dataset_type": "image_embeds", "disabled": False},
        ]
    )
    assert [dataset["dataset"] for dataset in imported.document["datasets"]] == ["photos"]
    skipped = [
        line for line in imported.report.lines if line.key.split(".")[0] in ("off", "also-off", "text", "latents")
    ]
    assert len(skipped) == 4 + 3 + 5 + 4
    assert {line.outcome for line in skipped} == {Outcome.IGNORED}
    assert "hush" not in str(imported.report.as_json())


@pytest.mark.parametrize("kind", ["mask", "segmentation"])
def test_masks_belong_to_the_entry_that_names_them(bring: Bring, tmp_path: Path, kind: str) -> None:
    masks = {"id": "masks", "type": "local", "dataset_type": "conditioning", "conditioning_type": kind}
    entries = [entry(conditioning_data="masks"), {**masks, "instance_data_dir": "masks"}]
    imported = bring({"masked_loss_probability": 0.5}, datasets=entries)
    assert ("masked_loss_probability" in imported.document["optimization"]) is (kind == "segmentation")
    (dataset,) = imported.document["datasets"]
    assert dataset["mask_type"] == kind
    assert imported.plans[0].masks == tmp_path / "masks"
    assert f"--masks {tmp_path / 'masks'}" in imported.plans[0].commands()[1]
    assert not imported.report.has_refusals


def test_other_conditions_and_masks_of_nothing_are_refused(bring: Bring, line_of: LineOf) -> None:
    other = {"id": "depth", "type": "local", "dataset_type": "conditioning", "conditioning_type": "depth"}
    assert "mask" in line_of(bring(datasets=[PHOTOS, other]), "depth.conditioning_type").reason
    lonely = {**other, "conditioning_type": "mask"}
    assert "conditioning_data" in line_of(bring(datasets=[PHOTOS, lonely]), "depth.dataset_type").reason


def test_evaluation_counts_images_where_simpletuner_counts_batches(bring: Bring) -> None:
    entries = [PHOTOS, entry(id="eval", dataset_type="eval")]
    config = {"eval_steps_interval": 50, "num_eval_images": 2, "train_batch_size": 3, "eval_timesteps": 10}
    imported = bring(config, datasets=entries)
    assert imported.document["evaluation"] == {"every_steps": 50, "num_images": 6, "num_timesteps": 10}
    assert bring({"eval_epoch_interval": 1}, datasets=entries).document["evaluation"] == {
        "every_steps": 0,
        "every_epochs": 1,
        "num_images": 4,
    }
    for unmeasured in ({}, {**config, "eval_loss_disable": True}):
        document = bring(unmeasured, datasets=entries).document
        assert "evaluation" not in document
        assert [dataset["dataset"] for dataset in document["datasets"]] == ["photos"]


def test_an_offset_of_the_normal_draw_needs_that_draw(bring: Bring, line_of: LineOf) -> None:
    imported = bring({"flux_fast_schedule": True}, datasets=[entry(timestep_sampling_offset=0.5)])
    assert line_of(imported, "photos.timestep_sampling_offset").outcome == "ignored"
    assert "timestep_sampling_offset" not in imported.document["datasets"][0]


def test_names_are_made_valid_the_same_way_every_time_and_told(bring: Bring, line_of: LineOf) -> None:
    imported = bring(datasets=[entry(id="My Cat_Photos"), entry(id="my-cat-photos"), entry(id="写真")])
    names = [dataset["dataset"] for dataset in imported.document["datasets"]]
    assert names[:2] == ["my-cat-photos", "my-cat-photos-2"]
    assert names[2].startswith("dataset-")
    assert names == [plan.name for plan in imported.plans]
    assert line_of(imported, "My Cat_Photos.id").outcome == "changed"
    assert line_of(imported, "my-cat-photos.id").outcome == "changed"


def test_relative_folders_are_found_below_the_root(bring: Bring, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for named in ("photos", "datasets/photos", "/elsewhere/photos"):
        (plan,) = bring(datasets=[entry(instance_data_dir=named)]).plans
        assert plan.folder == (Path(named) if named.startswith("/") else tmp_path / "photos")


COMMANDS: list[tuple[dict[str, Any], str]] = [
    (
        {"type": "aws", "aws_bucket_name": "b", "aws_data_prefix": "cats/", "caption_strategy": "textfile"},
        "import photos --bucket b --prefix cats/ --captions textfile",
    ),
    (
        {"type": "huggingface", "dataset_name": "me/cats", "split": "test", "caption_strategy": "huggingface"},
        "add photos --huggingface me/cats --split test --image-column image --caption-column caption",
    ),
    (
        {
            "type": "csv",
            "csv_file": "/l.csv",
            "csv_url_column": "u",
            "csv_caption_column": "c",
            "caption_strategy": "csv",
        },
        "import photos --urls /l.csv --url-column u --caption-column c",
    ),
    (
        {
            "instance_data_dir": "/p",
            "caption_strategy": "parquet",
            "metadata_backend": "parquet",
            "parquet": {
                "path": "/p.parquet",
                "filename_column": "f",
                "caption_column": "c",
                "identifier_includes_extension": False,
            },
        },
        "add photos /p --captions parquet --caption-file /p.parquet --filename-column f --caption-column c "
        "--no-extension",
    ),
    ({"instance_data_dir": "/my photos"}, "add photos '/my photos' --captions textfile"),
]


@pytest.mark.parametrize(("more", "command"), COMMANDS, ids=lambda value: str(value)[:40])
def test_every_backend_has_its_command(bring: Bring, more: dict[str, Any], command: str) -> None:
    (plan,) = bring(datasets=[entry(**more)]).plans
    assert plan.commands() == ("reverie dataset create photos", f"reverie dataset {command}")
