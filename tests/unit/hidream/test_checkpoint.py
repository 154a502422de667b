"""Finding a checkpoint, checking that it is whole, and its fingerprints."""

import json
import os
import shutil
from pathlib import Path

import pytest
from reverie_common.errors import InvalidArgumentError, NotFoundError
from reverie_hidream.checkpoint import (
    PARTS,
    component_directory,
    component_fingerprint,
    require_parts,
    resolve_checkpoint,
    resolve_llama,
)


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def test_finds_a_local_directory(tiny_checkpoint: Path) -> None:
    assert resolve_checkpoint(str(tiny_checkpoint)) == tiny_checkpoint


def test_finds_a_relative_directory_before_the_hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parents[1])
    relative = f"{checkpoint.parent.name}/{checkpoint.name}"
    assert resolve_checkpoint(relative) == checkpoint


@pytest.mark.parametrize("location", ["/nowhere/at/all", "", "no-such-directory", "./a/b", "a/b/c"])
def test_names_the_location_and_the_remedy_when_nothing_is_there(location: str) -> None:
    with pytest.raises(NotFoundError, match="Hub id") as caught:
        resolve_checkpoint(location)
    assert caught.value.reason == "CHECKPOINT_NOT_FOUND"
    assert caught.value.metadata == {"checkpoint": location}


def test_refuses_an_s3_location_without_a_store() -> None:
    with pytest.raises(InvalidArgumentError, match="object store"):
        resolve_checkpoint("s3://bucket/tiny")


def test_a_tiny_checkpoint_has_every_part(tiny_checkpoint: Path) -> None:
    require_parts(tiny_checkpoint, PARTS)


def test_names_every_missing_part_at_once(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "vae")
    (checkpoint / "scheduler" / "scheduler_config.json").unlink()
    (checkpoint / "tokenizer_3" / "tokenizer.json").unlink()
    with pytest.raises(NotFoundError, match="download it again") as caught:
        require_parts(checkpoint, PARTS)
    assert caught.value.reason == "CHECKPOINT_PART_MISSING"
    assert caught.value.metadata == {"checkpoint": str(checkpoint), "parts": "vae,tokenizer_3,scheduler"}


def test_refuses_a_part_that_no_checkpoint_has(tiny_checkpoint: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="text_encoder_5"):
        require_parts(tiny_checkpoint, ["text_encoder_5"])


def test_names_weights_without_configuration(checkpoint: Path) -> None:
    (checkpoint / "vae" / "config.json").unlink()
    with pytest.raises(NotFoundError, match=r"vae/ has no config\.json"):
        require_parts(checkpoint, ["vae"])


def test_names_configuration_without_weights(checkpoint: Path) -> None:
    (checkpoint / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"no \*\.safetensors"):
        require_parts(checkpoint, ["text_encoder"])


def test_names_the_shard_that_the_index_lists_and_the_folder_lacks(checkpoint: Path) -> None:
    index = {"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "diffusion_pytorch_model-2.safetensors"}}
    folder = checkpoint / "transformer"
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(NotFoundError, match=r"transformer/ has no diffusion_pytorch_model-2\.safetensors"):
        require_parts(checkpoint, ["transformer"])


@pytest.mark.parametrize("kept_bytes", [0, 5, 100, -1])
def test_names_a_truncated_file(checkpoint: Path, kept_bytes: int) -> None:
    weights = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, kept_bytes % weights.stat().st_size)
    with pytest.raises(NotFoundError, match=r"truncated files: diffusion_pytorch_model\.safetensors"):
        require_parts(checkpoint, ["vae"])


def test_says_where_llama_comes_from_when_only_llama_is_missing(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "text_encoder_4")
    with pytest.raises(NotFoundError, match="leave Llama out") as caught:
        resolve_llama(checkpoint)
    assert caught.value.metadata["parts"] == "text_encoder_4"


def test_takes_llama_from_the_checkpoint_that_has_it(tiny_checkpoint: Path) -> None:
    assert resolve_llama(tiny_checkpoint) == tiny_checkpoint


def test_takes_llama_from_a_plain_repository(checkpoint: Path, tmp_path: Path) -> None:
    llama = tmp_path / "Llama-3.1-8B"
    shutil.move(checkpoint / "text_encoder_4", llama)
    shutil.copytree(checkpoint / "tokenizer_4", llama, dirs_exist_ok=True)
    shutil.rmtree(checkpoint / "tokenizer_4")
    assert resolve_llama(checkpoint, str(llama)) == llama
    assert component_directory(llama, "text_encoder_4") == llama


def test_refuses_a_plain_repository_without_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    llama = Path(shutil.copytree(checkpoint / "text_encoder_4", tmp_path / "llama"))
    with pytest.raises(NotFoundError, match=r"tokenizer_4/ has none of tokenizer\.json"):
        resolve_llama(checkpoint, str(llama))


def test_fingerprint_does_not_depend_on_the_place(tiny_checkpoint: Path, checkpoint: Path) -> None:
    parts = ["text_encoder", "tokenizer"]
    assert component_fingerprint(checkpoint, parts) == component_fingerprint(tiny_checkpoint, parts)
    assert len(component_fingerprint(checkpoint, parts)) == 64


def test_fingerprints_of_different_parts_differ(tiny_checkpoint: Path) -> None:
    assert len({component_fingerprint(tiny_checkpoint, [part]) for part in PARTS}) == len(PARTS)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_one_changed_byte_changes_the_fingerprint(checkpoint: Path, name: str) -> None:
    before = component_fingerprint(checkpoint, ["vae"])
    path = checkpoint / "vae" / name
    status, body = path.stat(), bytearray(path.read_bytes())
    body[-3] ^= 1
    path.write_bytes(body)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert component_fingerprint(checkpoint, ["vae"]) != before


def test_a_renamed_file_changes_the_fingerprint(checkpoint: Path) -> None:
    before = component_fingerprint(checkpoint, ["tokenizer"])
    (checkpoint / "tokenizer" / "tokenizer.json").rename(checkpoint / "tokenizer" / "vocab.json")
    assert component_fingerprint(checkpoint, ["tokenizer"]) != before


def test_a_readme_does_not_change_the_fingerprint(checkpoint: Path) -> None:
    before = component_fingerprint(checkpoint, ["vae"])
    (checkpoint / "vae" / "README.md").write_text("a VAE", encoding="utf-8")
    assert component_fingerprint(checkpoint, ["vae"]) == before
