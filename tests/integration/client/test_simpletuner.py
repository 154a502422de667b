"""A configuration of SimpleTuner's, brought to a trainer process with a real store."""

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest
from reverie_client import SyncReverie
from reverie_client.cli.app import app
from typer.testing import CliRunner, Result

PHOTOS = Path(__file__).parents[3] / "examples" / "quickstart" / "photos"

Run = Callable[..., Result]


class Trainer(Protocol):
    """What conftest's TrainerProcess offers."""

    address: str


@pytest.fixture
def run(trainer: Trainer, tmp_path: Path) -> Run:
    environment = {"REVERIE_ADDRESS": trainer.address, "REVERIE_STATE_DIR": str(tmp_path / "state")}
    return lambda *arguments: CliRunner().invoke(app, [str(word) for word in arguments], env=environment)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A small configuration: a subject by its captions, the same by one prompt with masks, and images to measure on."""
    mark = uuid.uuid4().hex[:8]
    photos, masks = tmp_path / "datasets" / "photos", tmp_path / "datasets" / "masks"
    photos.mkdir(parents=True)
    masks.mkdir()
    for name in ("cat", "coffee", "rocket"):
        shutil.copy(PHOTOS / f"{name}.jpg", photos)
        shutil.copy(PHOTOS / f"{name}.txt", photos)
    shutil.copy(PHOTOS / "cat.jpg", masks)
    local = {
        "type": "local",
        "instance_data_dir": "datasets/photos",
        "resolution": 256,
        "metadata_backend": "discovery",
    }
    entries: list[Mapping[str, Any]] = [
        {**local, "id": f"Subject {mark}", "caption_strategy": "textfile", "repeats": 2},
        {
            **local,
            "id": f"masked-{mark}",
            "only_instance_prompt": True,
            "instance_prompt": "sks",
            "conditioning_data": "m",
        },
        {**local, "id": f"eval-{mark}", "dataset_type": "eval", "caption_strategy": "filename"},
        {
            **local,
            "id": "m",
            "dataset_type": "conditioning",
            "conditioning_type": "mask",
            "instance_data_dir": "datasets/masks",
        },
        {"id": "t", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache"},
    ]
    options = {
        "--model_family": "hidream",
        "--model_type": "lora",
        "--lora_type": "lycoris",
        "--lycoris_config": "config/lycoris_config.json",
        "--data_backend_config": "config/multidatabackend.json",
        "--user_prompt_library": "config/user_prompt_library.json",
        "--tracker_run_name": f"run {mark}",
        "--max_train_steps": "4",
        "--train_batch_size": 1,
        "--learning_rate": "1e-3",
        "--optimizer": "optimi-lion",
        "--validation_resolution": "128x128",
        "--validation_num_inference_steps": "2",
        "--validation_step_interval": "2",
        "--eval_steps_interval": 2,
        "--num_eval_images": 1,
        "--gradient_checkpointing": "false",
    }
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(options))
    (folder / "multidatabackend.json").write_text(json.dumps(entries))
    (folder / "user_prompt_library.json").write_text('{"sks_<token>": "a photo of sks",}')
    (folder / "lycoris_config.json").write_text(
        '{"algo": "lokr", "multiplier": 1.0, "linear_dim": 16384, "linear_alpha": 1, "full_matrix": true, "factor": 4,'
        ' "apply_preset": {"target_module": ["Attention",], "module_algo_map": {"Attention": {"factor": 4},},},}'
    )
    return folder


def test_pictures_are_brought_and_the_job_is_accepted(
    run: Run, reverie: SyncReverie, config: Path, tmp_path: Path
) -> None:
    arguments = ["import", "simpletuner", config, "--dataset-root", tmp_path, "--upload"]
    result = run(*arguments, "-o", tmp_path / "job.yaml", "-o", "json")
    assert result.exit_code == 0, result.stderr
    plans = json.loads(result.stdout)["datasets"]
    assert [reverie.datasets.get(plan["name"]).num_samples for plan in plans] == [3, 3, 3]
    checked = run("job", "check", tmp_path / "job.yaml", "-o", "json")
    assert checked.exit_code == 0, checked.stderr

    again = run(*arguments, "-o", "json")
    assert again.exit_code == 0, again.stderr
    assert [reverie.datasets.get(plan["name"]).num_samples for plan in plans] == [3, 3, 3]
    assert "exists" in again.stderr


def test_a_configuration_is_submitted_in_one_go(run: Run, reverie: SyncReverie, config: Path, tmp_path: Path) -> None:
    result = run("job", "submit", "--simpletuner", config, "--dataset-root", tmp_path)
    assert result.exit_code == 0, result.stderr
    job_id = result.stdout.strip()
    spec = reverie.jobs.get(job_id).spec
    assert "honoured" in result.stderr
    assert [dataset.role for dataset in spec.datasets] == ["train", "train", "evaluation"]
    assert [dataset.mask_type for dataset in spec.datasets] == ["none", "mask", "none"]
    assert [prompt.name for prompt in spec.validation.prompts] == ["sks_token", "validation"][
        : len(spec.validation.prompts)
    ]
    assert not spec.optimization.gradient_checkpointing
    assert (spec.adapter.lokr.factor, spec.adapter.lokr.full_matrix) == (4, True)
    reverie.jobs.cancel(job_id)


def test_a_folder_with_problems_stops_before_anything_is_made(
    run: Run, reverie: SyncReverie, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "datasets" / "photos" / "cat.txt").unlink()
    result = run("job", "submit", "--simpletuner", config, "--dataset-root", tmp_path)
    assert result.exit_code == 2
    assert "cat.jpg" in result.stderr
    plans = json.loads(run("import", "simpletuner", config, "-o", "json").stdout)["datasets"]
    names = {dataset.name for dataset in reverie.datasets.list(limit=1000)}
    assert names.isdisjoint(plan["name"] for plan in plans)


@pytest.mark.parametrize(
    ("answers", "exit_code", "field"),
    [("dataset: nowhere", 0, "datasets[0].dataset"), ("base_precision: int8-sdnq", 2, "model.base_precision")],
)
def test_answers_are_checked_by_the_trainer(run: Run, tmp_path: Path, answers: str, exit_code: int, field: str) -> None:
    (tmp_path / "answers.yaml").write_text(answers)
    result = run("configure", "--yes", "--answers", tmp_path / "answers.yaml", "-o", tmp_path / "job.yaml")
    assert result.exit_code == exit_code, result.stderr
    assert field in result.stderr
