"""Checkpoints from a real S3 server, and from a Hub that HF_ENDPOINT names."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reverie_common.storage import S3Store
from reverie_hidream.checkpoint import PARTS, component_fingerprint, require_parts, resolve_checkpoint
from reverie_hidream.checkpoint_store import upload_checkpoint

# The Hub's client reads its environment when it is imported, so each case is a process of its own.
SCRIPT = """
import json, sys
from pathlib import Path
from reverie_common.errors import ReverieError
from reverie_hidream.checkpoint import resolve_checkpoint
parts = json.loads(sys.argv[2])
try:
    print(json.dumps({"path": str(resolve_checkpoint(sys.argv[1], parts=parts))}))
except ReverieError as error:
    print(json.dumps({"class": type(error).__name__, "reason": error.reason, "message": error.message}))
"""


def resolve(location: str, endpoint: str, home: Path, parts: list[str] | None = None) -> dict[str, Any]:
    """Resolve a checkpoint in a fresh process with HF_ENDPOINT set."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", SCRIPT, location, json.dumps(parts)]
    done = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=120, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_s3_gives_back_what_was_uploaded(tiny_checkpoint: Path, s3_store: S3Store, tmp_path: Path) -> None:
    location = upload_checkpoint(tiny_checkpoint, s3_store, "checkpoints/tiny", chunk_bytes=1_000_000)
    resolved = resolve_checkpoint(location, store=s3_store, cache_dir=tmp_path)
    require_parts(resolved, PARTS)
    assert component_fingerprint(resolved, PARTS) == component_fingerprint(tiny_checkpoint, PARTS)


def test_hub_gives_the_whole_repository_without_pickles(tiny_checkpoint: Path, hub: Any, tmp_path: Path) -> None:
    repository = Path(shutil.copytree(tiny_checkpoint, tmp_path / "repository"))
    (repository / "weights.bin").write_bytes(b"pickle")
    (repository / "README.md").write_text("tiny", encoding="utf-8")
    hub.repositories["org/with-pickles"] = repository
    resolved = Path(resolve("org/with-pickles", hub.endpoint, tmp_path / "home")["path"])
    require_parts(resolved, PARTS)
    assert component_fingerprint(resolved, PARTS) == component_fingerprint(tiny_checkpoint, PARTS)
    assert sorted(hub.paths) == sorted(
        str(path.relative_to(tiny_checkpoint)) for path in tiny_checkpoint.rglob("*") if path.is_file()
    )


def test_hub_sends_only_the_parts_asked_for_and_only_once(hub: Any, tmp_path: Path) -> None:
    first = resolve("org/tiny", hub.endpoint, tmp_path, ["vae"])
    read = sorted(hub.paths)
    second = resolve("org/tiny@main", hub.endpoint, tmp_path, ["vae"])
    assert first == second
    assert read == ["model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert sorted(hub.paths) == read


def test_hub_answers_from_its_cache_when_it_is_gone(hub: Any, tmp_path: Path) -> None:
    first = resolve("org/tiny", hub.endpoint, tmp_path, ["scheduler"])
    assert resolve("org/tiny", "http://127.0.0.1:9", tmp_path, ["scheduler"]) == first


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("org/unknown", ("NotFoundError", "CHECKPOINT_NOT_FOUND", "HF_TOKEN")),
        ("org/gated", ("PermissionDeniedError", "CHECKPOINT_GATED", "accept its licence")),
    ],
)
def test_hub_says_why_it_refuses(hub: Any, tmp_path: Path, location: str, expected: tuple[str, str, str]) -> None:
    hub.gated.add("org/gated")
    refusal = resolve(location, hub.endpoint, tmp_path)
    assert (refusal["class"], refusal["reason"]) == expected[:2]
    assert expected[2] in refusal["message"]


def test_an_unreachable_hub_is_named_with_the_remedy(tmp_path: Path) -> None:
    refusal = resolve("org/tiny", "http://127.0.0.1:9", tmp_path)
    assert (refusal["class"], refusal["reason"]) == ("UnavailableError", "HUB_UNAVAILABLE")
    assert "HF_ENDPOINT" in refusal["message"]


def test_the_upload_command_feeds_an_s3_location(
    tiny_checkpoint: Path, s3_store: S3Store, store_environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "reverie_hidream.upload", "--directory", str(tiny_checkpoint), "--prefix", "tiny"]
    done = subprocess.run(
        command, env={**os.environ, **store_environment}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = resolve_checkpoint(f"s3://{s3_store.bucket}/tiny", store=s3_store, cache_dir=tmp_path)
    assert (found / "transformer" / "config.json").read_bytes() == (
        tiny_checkpoint / "transformer" / "config.json"
    ).read_bytes()
