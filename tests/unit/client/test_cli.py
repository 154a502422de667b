"""The command without a server: help, usage, errors, exit codes."""

import json
from pathlib import Path

import pytest
from reverie.training.v1.job_pb2 import JobFailure, TrainingJob, TrainingJobState
from reverie_client.cli.app import app
from reverie_client.cli.console import EXIT_CODES_HELP, error_dict, exit_code_of
from reverie_client.cli.progress import readable_bytes
from reverie_client.errors import JobFailedError, TransferError
from reverie_common.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ReverieError,
    UnavailableError,
)
from typer.testing import CliRunner, Result

NOWHERE = "127.0.0.1:9"

COMMANDS = [
    ["up"],
    ["down"],
    ["status"],
    ["sample"],
    *[["dataset", name] for name in ("create", "add", "scan", "list", "delete")],
    *[["job", name] for name in ("check", "submit", "watch", "list", "get", "cancel", "resume", "fetch")],
    ["checkpoint", "make-tiny"],
    *[["import", name] for name in ("simpletuner", "options")],
    ["configure"],
]


def run(*arguments: str, state_dir: Path | None = None) -> Result:
    environment = {"REVERIE_STATE_DIR": str(state_dir or "/nonexistent"), "XDG_STATE_HOME": "/nonexistent"}
    return CliRunner().invoke(app, list(arguments), env=environment)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_takes_output(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "--output" in result.stdout


def test_help_lists_the_exit_codes() -> None:
    shown = " ".join(run("--help").stdout.split())
    assert EXIT_CODES_HELP[:40] in shown


def test_unknown_option_is_a_usage_error() -> None:
    assert run("job", "list", "--colour").exit_code == 2


def test_errors_are_json_on_request() -> None:
    result = run("job", "check", "/nonexistent/job.yaml", "-o", "json")
    assert result.exit_code == 4
    assert result.stdout == ""
    assert json.loads(result.stderr)["error"]["reason"] == "NO_JOB_FILE"


def test_a_wrong_job_file_names_every_field(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("optimization: {max_steps: -1, optimzer: adamw}")
    result = run("job", "submit", str(path), "--address", NOWHERE)
    assert result.exit_code == 2
    assert "optimization.max_steps" in result.stderr
    assert "did you mean optimizer?" in result.stderr


def test_a_bad_folder_is_refused_before_anything_is_created(tmp_path: Path) -> None:
    result = run("dataset", "create", "cats", str(tmp_path), "--address", NOWHERE)
    assert result.exit_code == 2
    assert "no images detected in dataset" in result.stderr


def test_an_unknown_state_is_refused_with_the_known_ones() -> None:
    result = run("job", "list", "--state", "RUNNING", "--address", NOWHERE)
    assert result.exit_code == 2
    assert "TRAINING" in result.stderr


@pytest.mark.parametrize("size", ["1024", "x", "axb", "10x10x10", "-1x10"])
def test_a_wrong_size_is_refused(size: str) -> None:
    result = run("sample", "a cat", f"--size={size}", "--address", NOWHERE)
    assert result.exit_code == 2
    assert "WIDTHxHEIGHT" in result.stderr


def test_an_adapter_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = run("sample", "a cat", "--adapter", str(tmp_path / "none.safetensors"))
    assert result.exit_code == 2
    assert "none.safetensors is not a file" in result.stderr


def test_status_of_nothing_is_stopped(tmp_path: Path) -> None:
    result = run("status", "-o", "json", state_dir=tmp_path)
    assert result.exit_code == 1
    assert {service["health"] for service in json.loads(result.stdout)["services"]} == {"stopped"}


def test_down_of_nothing_is_fine(tmp_path: Path) -> None:
    assert run("down", state_dir=tmp_path).exit_code == 0


def test_make_tiny_keeps_a_directory_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    result = run("checkpoint", "make-tiny", str(tmp_path))
    assert result.exit_code == 5
    assert (tmp_path / "mine").exists()


def failed_job() -> JobFailedError:
    failure = JobFailure(reason="WORKER_CRASHED", message="it crashed", remedy="give it more memory")
    return JobFailedError(TrainingJob(state=TrainingJobState.TRAINING_JOB_STATE_FAILED, failure=failure))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (failed_job(), 1),
        (InternalError("a"), 1),
        (InvalidArgumentError("a"), 2),
        (UnavailableError("a"), 3),
        (TransferError("a"), 3),
        (NotFoundError("a"), 4),
        (AlreadyExistsError("a"), 5),
        (FailedPreconditionError("a"), 5),
    ],
)
def test_exit_code_tells_the_kind_of_error(error: ReverieError, code: int) -> None:
    assert exit_code_of(error) == code


def test_a_failed_job_says_why_and_what_to_do() -> None:
    shown = error_dict(failed_job())["error"]
    assert "it crashed" in shown["message"]
    assert shown["remedy"] == "give it more memory"
    assert shown["reason"] == "WORKER_CRASHED"


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (7e12, "7000.0 GB")]
)
def test_sizes_are_readable(size_bytes: float, text: str) -> None:
    assert readable_bytes(size_bytes) == text
