"""The command against a trainer process and a real store."""

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
from reverie_client.cli.app import app
from typer.testing import CliRunner, Result

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"

Run = Callable[..., Result]


class Trainer(Protocol):
    """What conftest's TrainerProcess offers."""

    address: str


@pytest.fixture
def run(trainer: Trainer, tmp_path: Path) -> Run:
    environment = {"REVERIE_ADDRESS": trainer.address, "REVERIE_STATE_DIR": str(tmp_path / "state")}
    return lambda *arguments: CliRunner().invoke(app, [str(word) for word in arguments], env=environment)


@pytest.fixture
def dataset(run: Run) -> str:
    name = f"photos-{uuid.uuid4().hex[:8]}"
    assert run("dataset", "create", name, QUICKSTART / "photos").exit_code == 0
    return name


@pytest.fixture
def job_file(dataset: str, tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text((QUICKSTART / "job.yaml").read_text().replace("dataset: quickstart", f"dataset: {dataset}"))
    return path


def json_of(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_datasets_are_added_to_listed_and_deleted(run: Run, dataset: str, tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes((QUICKSTART / "photos" / "cat.jpg").read_bytes() + b"\0")
    assert run("dataset", "add", dataset, tmp_path).exit_code == 2
    added = json_of(run("dataset", "add", dataset, tmp_path, "--instance-prompt", "-o", "json"))
    assert added["num_replaced"] == 1
    names = [each["name"] for each in json_of(run("dataset", "list", "-o", "json"))["datasets"]]
    assert dataset in names
    assert run("dataset", "delete", dataset, "--yes").exit_code == 0
    assert run("dataset", "delete", dataset, "--yes").exit_code == 4


def test_a_dataset_that_exists_is_a_conflict(run: Run, dataset: str) -> None:
    result = run("dataset", "create", dataset)
    assert result.exit_code == 5
    assert dataset in result.stderr


def test_a_job_is_submitted_listed_shown_cancelled_and_resumed(run: Run, job_file: Path) -> None:
    job_id = run("job", "submit", job_file).stdout.strip()
    assert job_id.startswith("job-")
    assert json_of(run("job", "get", job_id, "-o", "json"))["job_id"] == job_id
    assert job_id in run("job", "list").stdout
    assert run("job", "cancel", job_id).exit_code == 0

    watched = run("job", "watch", job_id)
    assert watched.exit_code == 1
    assert "CANCELLED" in watched.stderr
    assert f"reverie job resume {job_id}" in watched.stderr
    assert run("job", "cancel", job_id).exit_code == 5

    assert run("job", "resume", job_id).exit_code == 0
    assert run("job", "cancel", job_id).exit_code == 0


def test_events_are_json_lines(run: Run, job_file: Path) -> None:
    job_id = json_of(run("job", "submit", job_file, "-o", "json"))["job_id"]
    run("job", "cancel", job_id)
    result = run("job", "watch", job_id, "-o", "json")
    assert result.exit_code == 1
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert events[0]["snapshot"]["job_id"] == job_id
    assert events[-1]["snapshot"]["state"] == "TRAINING_JOB_STATE_CANCELLED"


def test_what_there_is_of_an_unfinished_job_is_fetched(run: Run, job_file: Path, tmp_path: Path) -> None:
    job_id = run("job", "submit", job_file).stdout.strip()
    fetched = json_of(run("job", "fetch", job_id, "--to", tmp_path / "out", "-o", "json"))
    assert fetched["files"] == []
    assert json.loads((tmp_path / "out" / "job.json").read_text())["job_id"] == job_id
    assert run("job", "cancel", job_id).exit_code == 0


def test_a_job_with_wrong_values_names_every_field(run: Run, job_file: Path) -> None:
    text = job_file.read_text().replace("learning_rate: 3e-3", "learning_rate: .nan")
    job_file.write_text(text.replace("optimizer: adamw", "optimizer: sgd"))
    result = run("job", "submit", job_file)
    assert result.exit_code == 2
    assert "optimization.learning_rate" in result.stderr
    assert "optimization.optimizer" in result.stderr
    assert "Traceback" not in result.output


def test_an_unknown_job_is_exit_code_4(run: Run) -> None:
    assert run("job", "get", "job-000000000000").exit_code == 4


def test_an_unreachable_trainer_is_exit_code_3_and_says_what_to_do(run: Run) -> None:
    result = run("job", "list", "--address", "127.0.0.1:9")
    assert result.exit_code == 3
    assert "reverie up" in result.stderr
    assert "Traceback" not in result.output
