"""Checkpoints in the object store, in chunks, so that any size fits and a cut transfer goes on where it was.

Under the prefix that the user chose: `chunks/<sha256>` (create-only, so equal files are stored once) and
`manifest.json`, written last, which makes the upload visible:

    {"format": 1,
     "files": [{"path": "vae/config.json", "size_bytes": 763, "chunks": [{"sha256": ..., "size_bytes": 763}]}]}
"""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from reverie_common.errors import IntegrityError, NotFoundError, ObjectNotFoundError
from reverie_common.storage import ObjectStore

logger = logging.getLogger(__name__)

CHUNK_BYTES = 64 * 1024 * 1024
_FORMAT = 1
_SUFFIXES = (".json", ".safetensors", ".txt", ".model")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chunk:
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    path: str
    size_bytes: int
    chunks: tuple[_Chunk, ...]


def upload_checkpoint(directory: Path, store: ObjectStore, prefix: str, *, chunk_bytes: int = CHUNK_BYTES) -> str:
    """Put a local checkpoint into the store and return its location, `s3://bucket/prefix`. Blocks; may be repeated.

    Only configuration, safetensors and tokenizer files go; chunks that the prefix already has are not sent again.

    Raises:
        NotFoundError: the directory has no such files.
    """
    files = [_upload_file(directory, path, store, prefix, chunk_bytes) for path in _checkpoint_files(directory)]
    if not files:
        raise NotFoundError(
            f"{directory} holds no checkpoint: no {', '.join(_SUFFIXES)} file", reason="CHECKPOINT_NOT_FOUND"
        )
    store.replace(_manifest_key(prefix), _to_json(files), media_type="application/json")
    return store.uri(prefix)


def download_checkpoint(
    store: ObjectStore, prefix: str, cache_dir: Path, *, parts: Sequence[str] | None = None
) -> Path:
    """Bring a checkpoint from the store into the cache and return its directory. Blocks; may be repeated.

    A file appears in the directory only when it is whole and every chunk's digest was verified. Processes that want the
    same checkpoint wait for one another. A new manifest under the same prefix gets a new directory.

    Raises:
        NotFoundError: there is no manifest under the prefix.
        IntegrityError: the store's bytes are not those of the manifest.
    """
    manifest = _read_manifest(store, prefix)
    directory = cache_dir / hashlib.sha256(manifest).hexdigest()
    directory.mkdir(parents=True, exist_ok=True)
    wanted = [file for file in _from_json(manifest, prefix) if parts is None or _is_in(file.path, parts)]
    with _locked(cache_dir / f"{directory.name}.lock"):
        for file in wanted:
            _download_file(file, directory, store, prefix)
    return directory


def _checkpoint_files(directory: Path) -> list[Path]:
    # Not rglob: Python 3.11's passes over folders that are links, and Llama is often linked into a checkpoint.
    files = (Path(folder) / name for folder, _, names in os.walk(directory, followlinks=True) for name in names)
    return sorted(path for path in files if path.suffix in _SUFFIXES)


def _upload_file(directory: Path, path: Path, store: ObjectStore, prefix: str, chunk_bytes: int) -> _File:
    chunks = []
    with path.open("rb") as stream:
        while body := stream.read(chunk_bytes):
            chunk = _Chunk(sha256=hashlib.sha256(body).hexdigest(), size_bytes=len(body))
            if store.head(_chunk_key(prefix, chunk)) is None:
                store.create(_chunk_key(prefix, chunk), body)
            chunks.append(chunk)
    logger.info("uploaded %s to %s", path, prefix)
    name = path.relative_to(directory).as_posix()
    return _File(path=name, size_bytes=sum(chunk.size_bytes for chunk in chunks), chunks=tuple(chunks))


def _download_file(file: _File, directory: Path, store: ObjectStore, prefix: str) -> None:
    target = directory / file.path
    if target.is_file() and target.stat().st_size == file.size_bytes:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    with partial.open("r+b" if partial.exists() else "w+b") as stream:
        for chunk in file.chunks[_whole_chunks(stream, file.chunks) :]:
            stream.write(store.get(_chunk_key(prefix, chunk), sha256=chunk.sha256, max_size_bytes=chunk.size_bytes))
            stream.flush()
        stream.truncate(file.size_bytes)
    partial.replace(target)
    logger.info("downloaded %s", target)


def _whole_chunks(stream: IO[bytes], chunks: Sequence[_Chunk]) -> int:
    """Count the chunks that an earlier download left whole, and place the stream after the last of them."""
    position = 0
    for index, chunk in enumerate(chunks):
        if hashlib.sha256(stream.read(chunk.size_bytes)).hexdigest() != chunk.sha256:
            stream.seek(position)
            return index
        position += chunk.size_bytes
    return len(chunks)


def _is_in(path: str, parts: Sequence[str]) -> bool:
    return "/" not in path or path.split("/")[0] in parts


def _read_manifest(store: ObjectStore, prefix: str) -> bytes:
    try:
        return store.get(_manifest_key(prefix))
    except ObjectNotFoundError as error:
        raise NotFoundError(
            f"there is no checkpoint at {store.uri(prefix)}: no {_manifest_key(prefix)} there; upload one with "
            "`python -m reverie_hidream.upload --directory DIR --prefix PREFIX`",
            reason="CHECKPOINT_NOT_FOUND",
            metadata={"checkpoint": store.uri(prefix)},
        ) from error


def _to_json(files: Sequence[_File]) -> bytes:
    entries = [
        {
            "path": file.path,
            "size_bytes": file.size_bytes,
            "chunks": [{"sha256": chunk.sha256, "size_bytes": chunk.size_bytes} for chunk in file.chunks],
        }
        for file in files
    ]
    return json.dumps({"format": _FORMAT, "files": entries}, sort_keys=True).encode()


def _from_json(body: bytes, prefix: str) -> list[_File]:
    try:
        content: dict[str, Any] = json.loads(body)
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}, expected {_FORMAT}")
        return [_file_of(entry) for entry in content["files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{_manifest_key(prefix)} is not a checkpoint manifest: {error}; upload it again"
        ) from error


def _file_of(entry: dict[str, Any]) -> _File:
    path = PurePosixPath(entry["path"])
    # Somebody else may have written the manifest: it must not choose files outside the cache.
    if path.is_absolute() or ".." in path.parts or path.suffix not in _SUFFIXES:
        raise ValueError(f"path {entry['path']!r} is not a checkpoint's")
    chunks = tuple(
        _Chunk(sha256=str(chunk["sha256"]), size_bytes=int(chunk["size_bytes"])) for chunk in entry["chunks"]
    )
    return _File(path=path.as_posix(), size_bytes=int(entry["size_bytes"]), chunks=chunks)


def _manifest_key(prefix: str) -> str:
    return f"{prefix}/manifest.json"


def _chunk_key(prefix: str, chunk: _Chunk) -> str:
    return f"{prefix}/chunks/{chunk.sha256}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; the system lets go of it when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
