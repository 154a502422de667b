"""`reverie import` and `reverie job submit --simpletuner` without a server: reports, files, exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from reverie_client.cli.app import app
from typer.testing import CliRunner, Result

REFERENCE = Path(__file__).parent / "simpletuner" / "reference"
NOWHERE = {"REVERIE_ADDRESS": "127.0.0.1:9", "REVERIE_STATE_DIR": "/nonexistent"}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in arguments], env=NOWHERE)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of which one key does not work here."""
    folder = tmp_path / "config"
    folder.mkdir()
    for path in REFERENCE.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    options = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**options, "mixed_precision": "fp16"}))
    return folder


def test_the_report_has_a_table_for_each_file_and_the_commands(tmp_path: Path) -> None:
    result = run("import", "simpletuner", REFERENCE, "--dataset-root", tmp_path, "-o", tmp_path / "job.yaml")
    assert result.exit_code == 0, result.stderr
    for file in ("config.json", "multidatabackend.json", "lycoris_config.json", "user_prompt_library.json"):
        assert file in result.stdout
    assert f"reverie dataset add dreambooth-subject {tmp_path}/datasets/dreambooth-subject" in result.stdout
    assert "75 honoured, 2 changed, 38 ignored, 3 added" in result.stdout
    assert yaml.safe_load((tmp_path / "job.yaml").read_text())["name"] == "eval-loss-test1"


def test_the_report_is_json_on_request(tmp_path: Path) -> None:
    result = run("import", "simpletuner", REFERENCE, "-o", "json", "-o", tmp_path / "job.yaml")
    document: dict[str, Any] = json.loads(result.stdout)
    assert document["counts"] == {"honoured": 75, "changed": 2, "ignored": 38, "refused": 0, "added": 3}
    assert document["job"] == yaml.safe_load((tmp_path / "job.yaml").read_text())
    assert {"file": "config.json", "key": "seed", "outcome": "honoured"}.items() <= document["lines"][11].items()
    assert [dataset["kind"] for dataset in document["datasets"]] == ["local", "local"]


def test_a_refusal_is_exit_code_1_and_the_file_is_written_without_it(config: Path, tmp_path: Path) -> None:
    result = run("import", "simpletuner", config, "-o", tmp_path / "job.yaml")
    assert result.exit_code == 1
    assert "the nearest that works is bf16" in " ".join(result.stdout.split())
    assert "mixed_precision" not in yaml.safe_load((tmp_path / "job.yaml").read_text())["model"]
    assert run("import", "simpletuner", config, "--allow-refused").exit_code == 0


def test_nothing_is_uploaded_or_submitted_after_a_refusal(config: Path) -> None:
    for arguments in (["import", "simpletuner", config, "--upload"], ["job", "submit", "--simpletuner", config]):
        assert run(*arguments).exit_code == 1  # and not 3: nobody was called


def test_a_file_is_written_over_only_by_force(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("mine")
    arguments = ["import", "simpletuner", REFERENCE, "-o", tmp_path / "job.yaml"]
    assert run(*arguments).exit_code == 5
    assert (tmp_path / "job.yaml").read_text() == "mine"
    assert run(*arguments, "--force").exit_code == 0


def test_options_can_be_set_as_on_simpletuners_command_line(tmp_path: Path) -> None:
    arguments = ["import", "simpletuner", REFERENCE, "-o", tmp_path / "job.yaml"]
    result = run(*arguments, "--set", "seed=7", "--set", "user_prompt_library=user_prompt_library.json")
    assert result.exit_code == 0, result.stderr
    job = yaml.safe_load((tmp_path / "job.yaml").read_text())
    assert job["seed"] == 7
    assert len(job["validation"]["prompts"]) == 16
    assert run("import", "simpletuner", REFERENCE, "--set", "seed").exit_code == 2


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    assert run("import", "simpletuner", tmp_path).exit_code == 4
    result = run("import", "simpletuner", REFERENCE, "--upload", "--dataset-root", tmp_path)
    assert result.exit_code == 2
    assert "this folder does not exist" in result.stderr
    assert "pseudo-camera-10k" in result.stderr


def test_a_job_file_or_a_configuration_is_needed_and_not_both(tmp_path: Path) -> None:
    assert run("job", "submit").exit_code == 2
    assert run("job", "submit", tmp_path / "job.yaml", "--simpletuner", REFERENCE).exit_code == 2


def test_options_are_listed(tmp_path: Path) -> None:
    assert "| `learning_rate` | honoured | optimization.learning_rate |" in run("import", "options").stdout
    listed = json.loads(run("import", "options", "-o", "json").stdout)
    assert {option["option"] for option in listed["Webhook file"]} >= {"webhook_type", "auth_token"}
