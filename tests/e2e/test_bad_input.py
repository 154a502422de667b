"""What a person gets wrong, through the `reverie` command and real processes: one clear answer, and nothing lost.

Every answer names the field or the file, the value, the limit and what to do. What the answers say in detail is tested
where they are made; here is that they arrive.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from reverie_client import SyncReverie
from reverie_client.stack import Stack
from reverie_common.errors import StoreFullError
from reverie_common.storage.seaweed import Seaweed

PHOTOS = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "photos"
REVERIE = Path(sys.executable).with_name("reverie")

EXIT_FAILED, EXIT_INVALID, EXIT_UNREACHABLE, EXIT_NOT_FOUND, EXIT_CONFLICT = 1, 2, 3, 4, 5

# A volume of 1 MB, and only one of them: full after the second megabyte.
TINY_DISK = ("-volume.max=1", "-master.volumeSizeLimitMB=1")

Cli = Callable[..., subprocess.CompletedProcess[str]]


def run_cli(*arguments: str | Path, address: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a person does, with JSON errors; `result.stderr` ends with the error."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REVERIE_")}
    command = [str(REVERIE), *map(str, arguments)]
    return subprocess.run(
        command,
        env={**environment, "REVERIE_ADDRESS": address, "REVERIE_STATE_DIR": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def cli(stack: Stack) -> Cli:
    """The command, talking to the stack."""
    return lambda *arguments: run_cli(*arguments, address=stack.addresses["trainer"])


@pytest.fixture(scope="module")
def kept(reverie: SyncReverie, photo_folder: Callable[..., Path]) -> Iterator[str]:
    """A dataset of three good pictures, which every mistake must leave as it is."""
    reverie.datasets.create("kept")
    before = reverie.datasets.upload_folder("kept", photo_folder("cat", "cat_upright", "clock")).dataset
    yield "kept"
    assert reverie.datasets.get("kept") == before


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a folder of some of the quickstart's photographs with their captions."""

    def make(*names: str) -> Path:
        folder = tmp_path_factory.mktemp("photos")
        for name in names:
            for suffix in (".jpg", ".txt"):
                shutil.copy(PHOTOS / f"{name}{suffix}", folder)
        return folder

    return make


@pytest.fixture
def job_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a job on the dataset `kept`; texts replace parts of it."""

    def write(**changes: str) -> Path:
        parts = {
            "dataset": "{dataset: kept, resolution: 128}",
            "adapter": "{lokr: {factor: 4}}",
            "optimization": "{max_steps: 1}",
            **changes,
        }
        text = (
            f"name: bad-input\ndatasets: [{parts['dataset']}]\nadapter: {parts['adapter']}\n"
            f"optimization: {parts['optimization']}\n{parts.get('more', '')}\n"
        )
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return path

    return write


def error_of(result: subprocess.CompletedProcess[str]) -> dict[str, object]:
    """The error that a command with `-o json` printed."""
    found: dict[str, object] = json.loads(result.stderr.splitlines()[-1])["error"]
    return found


def violations_of(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What was wrong, by field or file."""
    violations = error_of(result)["violations"]
    assert isinstance(violations, list)
    return {found["field"]: found["description"] for found in violations}


def test_every_problem_of_the_folders_is_named_at_once_and_nothing_is_added(
    cli: Cli, kept: str, tmp_path: Path
) -> None:
    bad, empty, missing = tmp_path / "bad", tmp_path / "empty", tmp_path / "missing"
    bad.mkdir()
    empty.mkdir()
    for name in ("uncaptioned", "long", "latin"):
        shutil.copy(PHOTOS / "cat.jpg", bad / f"{name}.jpg")
    (bad / "long.txt").write_text("x" * 10_000)
    (bad / "latin.txt").write_bytes(b"caf\xe9")
    result = cli("dataset", "add", kept, bad, empty, missing, "-o", "json")
    assert result.returncode == EXIT_INVALID
    found = violations_of(result)
    assert "does not exist" in found[str(missing)]
    assert "empty" in found[str(empty)]
    assert "no caption" in found[str(bad / "uncaptioned.jpg")]
    assert "uncaptioned.txt" in found[str(bad / "uncaptioned.jpg")]
    assert "10000 characters" in found[f"{bad / 'long.txt'}:1"]
    assert "8192" in found[f"{bad / 'long.txt'}:1"]
    assert "0xe9 at offset 3" in found[str(bad / "latin.txt")]
    assert "iconv" in found[str(bad / "latin.txt")]
    assert len(found) == 5


def test_every_mistake_of_a_job_is_named_at_once(cli: Cli, kept: str, job_file: Callable[..., Path]) -> None:
    path = job_file(
        dataset=f"{{dataset: {kept}, resolution: 0}}",
        adapter="{lokr: {factor: 4, apply_preset: {target_module: [Nothing]}}}",
        optimization="{max_steps: 1, optimizer: adamv, learning_rate: .nan, batch_size: 64}",
        more="checkpoint: {every_steps: 1}",
    )
    jobs_before = cli("job", "list").stdout
    for command in ("check", "submit"):
        result = cli("job", command, path, "-o", "json")
        assert result.returncode == EXIT_INVALID
        found = violations_of(result)
        assert "did you mean checkpoints?" in found["checkpoint"]
        assert "0 is outside 64 to 4096" in found["datasets[0].resolution"]
        assert "did you mean 'adamw'?" in found["optimization.optimizer"]
        assert "nan is not a finite number above 0" in found["optimization.learning_rate"]
        assert "Minimum repeats required: 21" in found["datasets[0].repeats"]
        assert "use target_module [Attention]" in found["adapter.lokr.apply_preset"]
        assert len(found) == 6
    assert cli("job", "list").stdout == jobs_before


def test_a_person_reads_what_a_program_reads(cli: Cli, job_file: Callable[..., Path]) -> None:
    result = cli("job", "submit", job_file(optimization="{max_steps: 0, learning_rate: .inf}"))
    assert result.returncode == EXIT_INVALID
    assert "optimization.max_steps: 0 is outside 1 to 1000000 optimiser steps; raise it" in result.stderr
    assert "optimization.learning_rate: inf is not a finite number" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def broken_dataset(cli: Cli, reverie: SyncReverie, photo_folder: Callable[..., Path]) -> Iterator[str]:
    """A dataset of one picture that ends early, an empty file, and a text that is called a picture."""
    folder = photo_folder()
    (folder / "cut.jpg").write_bytes((PHOTOS / "cat.jpg").read_bytes()[:20_000])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("this is not a picture")
    for name in ("cut", "empty", "text"):
        (folder / f"{name}.txt").write_text("a caption")
    assert cli("dataset", "create", "broken", folder).returncode == 0
    yield "broken"
    reverie.datasets.delete("broken")


def test_corrupt_pictures_are_named_by_a_scan_and_by_the_job(
    cli: Cli, broken_dataset: str, job_file: Callable[..., Path]
) -> None:
    scan = cli("dataset", "scan", broken_dataset, "-o", "json")
    assert scan.returncode == EXIT_FAILED
    problems = {each["sample"]: each["problems"][0] for each in json.loads(scan.stdout)["samples"]}
    assert "ends early" in problems["cut.jpg"]
    assert "0 bytes" in problems["empty.jpg"]
    assert "not an image" in problems["text.png"]
    job = cli(
        "job", "submit", "--watch", job_file(dataset=f"{{dataset: {broken_dataset}, resolution: 128}}"), "-o", "json"
    )
    assert job.returncode == EXIT_FAILED
    assert error_of(job)["reason"] == "DATASET_EMPTY"
    assert all(name in str(error_of(job)["message"]) for name in problems)
    assert error_of(job)["remedy"]


def test_a_port_in_use_is_named_before_anything_starts(stack: Stack, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        flags = ["--state-dir", str(tmp_path), "--checkpoint", stack.checkpoint, "--trainer-port", port, "-o", "json"]
        result = run_cli("up", "--detach", *flags, address="")
    assert result.returncode == EXIT_CONFLICT
    error = error_of(result)
    assert error["reason"] == "PORT_IN_USE"
    assert port in str(error["message"])
    assert "--trainer-port" in str(error["message"])


@pytest.mark.parametrize(
    ("module", "part", "named"),
    [("reverie_vae", "vae", "vae/ is missing"), ("reverie_trainer", "transformer", "transformer/config.json")],
)
def test_a_missing_checkpoint_part_is_named(
    module: str, part: str, named: str, stack: Stack, seaweed: Seaweed, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(stack.checkpoint, checkpoint, ignore=lambda _, names: {part} & set(names))
    message = fatal_message(module, ["--checkpoint", str(checkpoint)], environment=seaweed.environment)
    assert named in message
    assert str(checkpoint) in message


def test_an_unreachable_store_is_named_at_start(stack: Stack, free_port: Callable[[], int], seaweed: Seaweed) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    message = fatal_message(
        "reverie_trainer",
        ["--checkpoint", stack.checkpoint, "--store-retry-seconds", "0"],
        environment={**seaweed.environment, "REVERIE_STORE_ENDPOINT": endpoint},
    )
    assert endpoint in message
    assert "REVERIE_STORE_ENDPOINT" in message


def test_wrong_credentials_are_named_at_start(stack: Stack, seaweed: Seaweed) -> None:
    message = fatal_message(
        "reverie_trainer",
        ["--checkpoint", stack.checkpoint],
        environment={**seaweed.environment, "REVERIE_STORE_SECRET_KEY": "a guess"},
    )
    assert seaweed.endpoint in message
    assert "REVERIE_STORE_SECRET_KEY" in message
    assert "a guess" not in message


def fatal_message(module: str, flags: Sequence[str], *, environment: dict[str, str]) -> str:
    """Run a service that cannot start; returns its one error."""
    with subprocess.Popen(
        [sys.executable, "-m", module, *flags, "--port", "0", "--metrics-port", "0"],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            _, log = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == EXIT_FAILED
    lines = [json.loads(line) for line in log.splitlines()]
    (error,) = [line for line in lines if line["level"] == "error"]
    return str(error["message"])


@contextmanager
def trainer_alone(store: Seaweed, checkpoint: str, state_dir: Path) -> Iterator[str]:
    """A trainer on a store of its own, which may then be filled and stopped; yields its address."""
    ready = state_dir / "ready.json"
    flags = ["--checkpoint", checkpoint, "--state-dir", str(state_dir), "--ready-file", str(ready)]
    flags += ["--standby-workers", "0", "--port", "0", "--metrics-port", "0"]
    with subprocess.Popen(
        [sys.executable, "-m", "reverie_trainer", *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1", **store.environment},
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            yield f"127.0.0.1:{wait_for_port(ready, process)}"
        finally:
            process.kill()


def wait_for_port(ready: Path, process: subprocess.Popen[bytes]) -> int:
    """Wait for a service's ready file."""
    while not ready.exists():
        with suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"the service ended with status {process.wait(0.05)}")
    return int(json.loads(ready.read_text())["port"])


def test_a_store_that_fills_up_and_goes_away_is_named_and_loses_nothing(
    stack: Stack, photo_folder: Callable[..., Path], tmp_path: Path
) -> None:
    small, large = photo_folder("clock"), photo_folder("coffee", "galaxies")
    store = Seaweed(tmp_path / "store", extra_flags=TINY_DISK)
    store.start()
    try:
        with trainer_alone(store, stack.checkpoint, tmp_path) as address:
            assert run_cli("dataset", "create", "precious", small, address=address).returncode == 0
            before = run_cli("dataset", "list", "-o", "json", address=address).stdout
            fill(store)
            full = run_cli("dataset", "add", "precious", large, "-o", "json", address=address)
            store.stop(timeout_seconds=0.1)  # it never ends by itself when it is full
            gone = run_cli("dataset", "add", "precious", large, "-o", "json", address=address)
            after = run_cli("dataset", "list", "-o", "json", address=address).stdout
    finally:
        store.stop()
    assert full.returncode == EXIT_FAILED
    assert "full" in str(error_of(full)["message"])
    assert store.endpoint in str(error_of(full)["message"])
    assert gone.returncode == EXIT_UNREACHABLE
    assert f"object store {store.endpoint} does not answer" in str(error_of(gone)["message"])
    assert before == after
    assert json.loads(after)["datasets"][0]["num_samples"] == 1


def fill(store: Seaweed) -> None:
    """Write a megabyte at a time until there is no room."""
    objects = store.open_store(retry_seconds=0.0)
    with suppress(StoreFullError):
        for number in range(20):
            objects.create(f"fill/{number}", bytes(1_000_000))
        raise AssertionError("20 MB went into a store of 2 MB")
