"""`reverie configure`: answers become a job that the trainer accepts."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from reverie_client.cli.app import app
from reverie_client.job_text import job_text
from reverie_client.questions import QUESTIONS, job_of
from reverie_client.specs import load_job_spec, parse_job_spec
from reverie_trainer.jobs.checks import check_spec
from reverie_trainer.jobs.spec import spec_from_proto
from typer.testing import CliRunner, Result

NOWHERE = {"REVERIE_ADDRESS": "127.0.0.1:9", "REVERIE_STATE_DIR": "/nonexistent"}


def run(*arguments: object, typed: str = "") -> Result:
    return CliRunner().invoke(app, ["configure", *(str(word) for word in arguments)], env=NOWHERE, input=typed)


def answered(**given: Any) -> dict[str, Any]:
    """Defaults, with some answers in their place."""
    found: dict[str, Any] = {}
    for question in QUESTIONS:
        if question.applies(found):
            value = given.get(question.name)
            found[question.name] = question.default(found) if value is None else question.parse(value)
    return found


def test_every_default_makes_a_job_that_is_accepted(tmp_path: Path) -> None:
    result = run("--yes", "-o", tmp_path / "job.yaml")
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "job.yaml").read_text()
    assert "# 1 takes the least memory.\n  batch_size: 1" in text
    assert check_spec(spec_from_proto(load_job_spec(tmp_path / "job.yaml"))) == []


@pytest.mark.parametrize(
    "given",
    [
        {"adapter": "lora", "lora_rank": 8, "optimizer": "adamw"},
        {"adapter": "shared", "optimizer": "prodigy"},
        {"captions": "instanceprompt", "instance_prompt": "a photo of sks"},
        {"captions": "filename", "card_memory": 80, "ema": "no", "tensorboard": "y"},
        {"validation_prompts": "a; b", "trigger_words": "sks; cat", "resolution": 500},
    ],
    ids=str,
)
def test_every_choice_makes_a_job_that_is_accepted(given: dict[str, Any]) -> None:
    document, comments = job_of(answered(**given))
    assert check_spec(spec_from_proto(parse_job_spec(job_text(document, comments)))) == []


@pytest.mark.parametrize(
    ("given", "rate"),
    [
        ({"optimizer": "adamw"}, 1e-4),
        ({"optimizer": "optimi-lion"}, 2e-5),
        ({"optimizer": "prodigy"}, 1.0),
        ({"adapter": "lora", "lora_rank": 8, "optimizer": "adamw"}, 4e-4),
        ({"adapter": "lora", "lora_rank": 64, "optimizer": "adamw"}, 6e-5),
    ],
    ids=str,
)
def test_rates_are_the_guides(given: dict[str, Any], rate: float) -> None:
    assert answered(**given)["learning_rate"] == pytest.approx(rate)


@pytest.mark.parametrize(("gigabytes", "precision"), [(80, "no_change"), (24, "int8-quanto"), (16, "nf4-bnb")])
def test_the_base_fits_the_card(gigabytes: int, precision: str) -> None:
    assert answered(card_memory=gigabytes)["base_precision"] == precision


def test_answers_of_a_file_are_taken_and_the_rest_is_asked(tmp_path: Path) -> None:
    (tmp_path / "answers.yaml").write_text("name: cat\nmax_steps: 50\nfolder: ./photos\n")
    num_asked = len(answered()) - 3
    typed = "\n" * 3 + "1000000\n512\n" + "\n" * (num_asked - 4)  # the first answer for the resolution is too large
    result = run("--answers", tmp_path / "answers.yaml", "-o", tmp_path / "job.yaml", typed=typed)
    assert result.exit_code == 0, result.stderr
    assert "64 to 4096" in result.stderr
    job = yaml.safe_load((tmp_path / "job.yaml").read_text())
    assert (job["name"], job["optimization"]["max_steps"], job["datasets"][0]["resolution"]) == ("cat", 50, 512)
    assert "reverie dataset add cat ./photos" in result.stdout


def test_what_happens_next_is_json_on_request(tmp_path: Path) -> None:
    result = run("--yes", "-o", "json", "-o", tmp_path / "job.yaml")
    assert json.loads(result.stdout)["next"][-1] == f"reverie job submit {tmp_path / 'job.yaml'} --watch"


def test_a_file_is_written_over_only_by_force(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("mine")
    assert run("--yes", "-o", tmp_path / "job.yaml").exit_code == 5
    assert (tmp_path / "job.yaml").read_text() == "mine"
    assert run("--yes", "--force", "-o", tmp_path / "job.yaml").exit_code == 0


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("nmae: cat", "there is no such question"),
        ("name: My Cat", "for instance my-cat"),
        ("optimizer: adamw8bit", "bnb-adamw8bit"),
        ("validation_size: 100x100", "multiples of 16"),
        ("- cat", "holds no answers"),
    ],
)
def test_wrong_answers_are_told(tmp_path: Path, answers: str, message: str) -> None:
    (tmp_path / "answers.yaml").write_text(answers)
    result = run("--yes", "--answers", tmp_path / "answers.yaml", "-o", tmp_path / "job.yaml")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "job.yaml").exists()
