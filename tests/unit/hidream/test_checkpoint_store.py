"""Checkpoints in the object store: chunks, resumption, damage."""

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from reverie_common.errors import IntegrityError, NotFoundError, StoreUnavailableError
from reverie_common.storage import MemoryStore
from reverie_hidream.checkpoint import PARTS, component_fingerprint, require_parts, resolve_checkpoint
from reverie_hidream.checkpoint_store import upload_checkpoint

PREFIX = "checkpoints/tiny"
CHUNK_BYTES = 1_000_000


class FailingStore(MemoryStore):
    """A store whose server goes away after some reads, and comes back when `reads_left` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.reads_left = 1_000_000
        self.keys_read: list[str] = []

    def get(self, key: str, *, sha256: str | None = None, max_size_bytes: int | None = None) -> bytes:
        """Read, or fail."""
        if self.reads_left == 0:
            raise StoreUnavailableError("the store is gone")
        self.reads_left -= 1
        self.keys_read.append(key)
        return super().get(key, sha256=sha256, max_size_bytes=max_size_bytes)


@pytest.fixture
def store(tiny_checkpoint: Path) -> FailingStore:
    """A store that holds the tiny checkpoint in chunks of a megabyte."""
    store = FailingStore()
    upload_checkpoint(tiny_checkpoint, store, PREFIX, chunk_bytes=CHUNK_BYTES)
    return store


def resolve(store: MemoryStore, cache: Path, parts: Sequence[str] | None = None) -> Path:
    """Resolve the uploaded checkpoint."""
    return resolve_checkpoint(store.uri(PREFIX), store=store, cache_dir=cache, parts=parts)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below the directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_downloads_what_was_uploaded(tiny_checkpoint: Path, store: FailingStore, tmp_path: Path) -> None:
    resolved = resolve(store, tmp_path)
    assert contents(resolved) == contents(tiny_checkpoint)
    assert component_fingerprint(resolved, PARTS) == component_fingerprint(tiny_checkpoint, PARTS)


def test_accepts_a_slash_at_the_end(store: FailingStore, tmp_path: Path) -> None:
    location = f"{store.uri(PREFIX)}/"
    assert resolve_checkpoint(location, store=store, cache_dir=tmp_path) == resolve(store, tmp_path)


def test_reads_only_the_manifest_the_second_time(store: FailingStore, tmp_path: Path) -> None:
    resolve(store, tmp_path)
    store.keys_read.clear()
    resolve(store, tmp_path)
    assert store.keys_read == [f"{PREFIX}/manifest.json"]


def test_downloads_only_the_parts_asked_for(store: FailingStore, tmp_path: Path) -> None:
    resolved = resolve(store, tmp_path, ["vae", "scheduler"])
    require_parts(resolved, ["vae", "scheduler"])
    assert {path.name for path in resolved.iterdir()} == {"vae", "scheduler", "model_index.json"}


def test_goes_on_where_it_was_cut_off(tiny_checkpoint: Path, store: FailingStore, tmp_path: Path) -> None:
    store.reads_left = 5
    with pytest.raises(StoreUnavailableError):
        resolve(store, tmp_path)
    store.reads_left = 1_000_000
    resolved = resolve(store, tmp_path)
    assert contents(resolved) == contents(tiny_checkpoint)
    chunk_reads = [key for key in store.keys_read if "/chunks/" in key]
    assert len(chunk_reads) == len(set(chunk_reads))


def test_a_file_is_invisible_until_it_is_whole(store: FailingStore, tmp_path: Path) -> None:
    # The manifest, the weights' first chunk and then nothing: transformer/config.json is read between the two.
    store.reads_left = 1 + 2 + 1
    with pytest.raises(StoreUnavailableError):
        resolve(store, tmp_path, ["transformer"])
    (directory,) = (path for path in tmp_path.iterdir() if path.is_dir())
    partial = directory / "transformer" / "diffusion_pytorch_model.safetensors.partial"
    assert partial.stat().st_size == CHUNK_BYTES
    assert not partial.with_suffix("").exists()


def test_repairs_a_damaged_partial_file(tiny_checkpoint: Path, store: FailingStore, tmp_path: Path) -> None:
    store.reads_left = 1 + 2 + 2
    with pytest.raises(StoreUnavailableError):
        resolve(store, tmp_path, ["transformer"])
    (partial,) = tmp_path.rglob("*.partial")
    partial.write_bytes(partial.read_bytes()[:CHUNK_BYTES] + b"damage" * CHUNK_BYTES)
    store.reads_left = 1_000_000
    resolved = resolve(store, tmp_path, ["transformer"])
    assert contents(resolved / "transformer") == contents(tiny_checkpoint / "transformer")


def test_uploading_again_sends_no_chunk(tiny_checkpoint: Path, store: FailingStore, tmp_path: Path) -> None:
    before = {info.key for info in store.list(PREFIX)}
    assert upload_checkpoint(tiny_checkpoint, store, PREFIX, chunk_bytes=CHUNK_BYTES) == store.uri(PREFIX)
    assert {info.key for info in store.list(PREFIX)} == before


def test_a_new_upload_under_the_same_prefix_is_noticed(store: FailingStore, tmp_path: Path) -> None:
    first = resolve(store, tmp_path / "cache", ["scheduler"])
    changed = tmp_path / "changed"
    (changed / "scheduler").mkdir(parents=True)
    (changed / "scheduler" / "scheduler_config.json").write_text('{"shift": 6.0}', encoding="utf-8")
    upload_checkpoint(changed, store, PREFIX)
    second = resolve(store, tmp_path / "cache", ["scheduler"])
    assert second != first
    assert json.loads((second / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")) == {"shift": 6.0}


def test_refuses_damaged_chunks(store: FailingStore, tmp_path: Path) -> None:
    key = next(info.key for info in store.list(f"{PREFIX}/chunks/"))
    body = bytearray(store.get(key))
    body[0] ^= 1
    store.replace(key, bytes(body))
    with pytest.raises(IntegrityError):
        resolve(store, tmp_path)


@pytest.mark.parametrize("path", ["../outside.json", "/etc/outside.json", "vae/weights.bin"])
def test_refuses_a_manifest_that_reaches_outside(store: FailingStore, tmp_path: Path, path: str) -> None:
    manifest = {"format": 1, "files": [{"path": path, "size_bytes": 0, "chunks": []}]}
    store.replace(f"{PREFIX}/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(IntegrityError, match="upload it again"):
        resolve(store, tmp_path)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"format": 2, "files": []}', b'{"format": 1}'])
def test_refuses_what_is_not_a_manifest(store: FailingStore, tmp_path: Path, body: bytes) -> None:
    store.replace(f"{PREFIX}/manifest.json", body)
    with pytest.raises(IntegrityError, match="not a checkpoint manifest"):
        resolve(store, tmp_path)


def test_names_the_prefix_that_holds_no_checkpoint(memory_store: MemoryStore, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="upload") as caught:
        resolve_checkpoint(memory_store.uri("nothing/here"), store=memory_store, cache_dir=tmp_path)
    assert caught.value.metadata == {"checkpoint": memory_store.uri("nothing/here")}


def test_uploads_folders_that_are_links(tiny_checkpoint: Path, memory_store: MemoryStore, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "vae").symlink_to(tiny_checkpoint / "vae")
    upload_checkpoint(tmp_path / "linked", memory_store, PREFIX)
    assert contents(resolve(memory_store, tmp_path / "cache") / "vae") == contents(tiny_checkpoint / "vae")


def test_refuses_to_upload_an_empty_directory(memory_store: MemoryStore, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="holds no checkpoint"):
        upload_checkpoint(tmp_path, memory_store, PREFIX)


def test_two_downloads_at_once_fetch_each_chunk_once(
    store: FailingStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: resolve(store, tmp_path), range(2))
    chunk_reads = [key for key in store.keys_read if "/chunks/" in key]
    assert first == second
    assert len(chunk_reads) == len(set(chunk_reads))
