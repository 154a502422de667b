"""Where a checkpoint is and whether it is whole: directories, s3:// prefixes and the Hub, the parts, the fingerprints.

Everything else in this package takes the local directory that `resolve_checkpoint` returns. Weights are safetensors
only; pickles are neither downloaded nor read.
"""

import json
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from reverie_common.errors import (
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ReverieError,
    UnavailableError,
)
from reverie_common.storage import ObjectStore
from transformers.utils import logging as transformers_logging

from reverie_hidream.checkpoint_store import download_checkpoint
from reverie_hidream.fingerprints import files_fingerprint

MODEL_PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
TOKENIZER_PARTS = ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")
LLAMA_PARTS = ("text_encoder_4", "tokenizer_4")
PARTS = (*MODEL_PARTS, *TOKENIZER_PARTS, "scheduler")

# Any one of a group's files will do: tokenizers are saved as tokenizer.json or in their library's older formats.
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json")
_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
# Half-precision duplicates, and Meta's original format beside the converted Llama.
_HUB_UNWANTED = ("*.fp16.*", "*.fp16-*", "original/*")
_LLAMA_REMEDY = (
    "the released HiDream repositories leave Llama out: give it separately, as a directory, an s3:// prefix or a Hub "
    "id such as meta-llama/Meta-Llama-3.1-8B-Instruct"
)


def resolve_checkpoint(
    location: str,
    *,
    store: ObjectStore | None = None,
    cache_dir: Path | None = None,
    parts: Sequence[str] | None = None,
) -> Path:
    """Find a checkpoint and bring it onto this machine. Blocks; may be repeated, and goes on where it was cut off.

    Args:
        location: a directory, an `s3://bucket/prefix` that `upload_checkpoint` wrote, or a Hub id
            `org/name[@revision]`. HF_ENDPOINT, HF_TOKEN and HF_HOME are honoured by the Hub's own client.
        store: needed for s3://.
        cache_dir: where downloads are kept; None means ~/.cache/reverie/checkpoints or the Hub's own cache.
        parts: sub-folders to download (see PARTS); None means everything. Not checked: see `require_parts`.

    Returns:
        A local directory.

    Raises:
        NotFoundError: nothing is there; the message names the location and the remedy.
        InvalidArgumentError: the location is none of the three, or s3:// without its store.
        PermissionDeniedError, UnavailableError: the Hub or the store refused or did not answer.
    """
    if location.startswith("s3://"):
        return _from_store(location, store, cache_dir, parts)
    directory = Path(location).expanduser()
    if location and directory.is_dir():
        return directory.absolute()
    hub_id = _HUB_ID.fullmatch(location)
    if hub_id is None:
        raise _nowhere(location)
    return _from_hub(hub_id["name"], hub_id["revision"], cache_dir, parts)


def resolve_llama(
    checkpoint: Path, location: str | None = None, *, store: ObjectStore | None = None, cache_dir: Path | None = None
) -> Path:
    """Find encoder 4, which the released checkpoint lacks: in the location if one is given, else in the checkpoint.

    The location may have text_encoder_4/ and tokenizer_4/, or be a plain Llama repository.

    Raises:
        NotFoundError: Llama is in neither; the message names the missing part and the remedy.
    """
    llama = checkpoint if location is None else _resolve_llama_location(location, store, cache_dir)
    for part in LLAMA_PARTS:
        component_directory(llama, part)
    return llama


def require_parts(checkpoint: Path, parts: Sequence[str]) -> None:
    """Check that parts are present and whole, without reading their weights.

    Raises:
        NotFoundError: names every missing file at once, and the remedy.
        InvalidArgumentError: a part's name is unknown.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise InvalidArgumentError(f"checkpoint has no part called {', '.join(unknown)}; parts are {', '.join(PARTS)}")
    problems = {part: problem for part in parts if (problem := _problem(_directory(checkpoint, part), part))}
    if problems:
        raise _incomplete(checkpoint, problems)


def component_directory(checkpoint: Path, part: str) -> Path:
    """Directory of one part, checked: its sub-folder, or the root of a plain Llama repository for Llama's parts.

    Raises:
        NotFoundError: as `require_parts`.
    """
    require_parts(checkpoint, [part])
    return _directory(checkpoint, part)


def component_fingerprint(checkpoint: Path, subfolders: Sequence[str]) -> str:
    """Hex sha256 over names and contents of the parts' configuration, weights and tokenizer files.

    The first call reads every byte; later ones trust size, change time and inode.

    Raises:
        NotFoundError: as `require_parts`.
    """
    return files_fingerprint([component_directory(checkpoint, part) for part in subfolders])


@contextmanager
def progress_bars_disabled() -> Iterator[None]:
    """Keep transformers' own progress bars off stderr, which belongs to the service's log."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _from_store(location: str, store: ObjectStore | None, cache_dir: Path | None, parts: Sequence[str] | None) -> Path:
    if store is None:
        raise InvalidArgumentError(f"checkpoint {location} needs an object store; set its endpoint and credentials")
    cache = cache_dir or Path.home() / ".cache" / "reverie" / "checkpoints"
    return download_checkpoint(store, store.key_of(location.rstrip("/")), cache, parts=parts)


def _resolve_llama_location(location: str, store: ObjectStore | None, cache_dir: Path | None) -> Path:
    # The Hub's patterns cannot say "only in the root", where a plain Llama repository has its files.
    parts = LLAMA_PARTS if location.startswith("s3://") else None
    return resolve_checkpoint(location, store=store, cache_dir=cache_dir, parts=parts)


def _from_hub(name: str, revision: str | None, cache_dir: Path | None, parts: Sequence[str] | None) -> Path:
    wanted = _HUB_FILES if parts is None else [f"{part}/{files}" for part in parts for files in _HUB_FILES]
    try:
        snapshot = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=["model_index.json", *wanted],
            ignore_patterns=list(_HUB_UNWANTED),
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise _hub_error(name, revision, error) from error
    return Path(snapshot)


def _hub_error(name: str, revision: str | None, error: Exception) -> ReverieError:
    metadata = {"checkpoint": name}
    # Gated first: the library derives it from RepositoryNotFoundError.
    if isinstance(error, GatedRepoError):
        message = f"{name} is gated: accept its licence on the Hub and set HF_TOKEN"
        return PermissionDeniedError(message, reason="CHECKPOINT_GATED", metadata=metadata)
    if isinstance(error, RevisionNotFoundError):
        message = f"{name} has no revision {revision} on the Hub"
        return NotFoundError(message, reason="CHECKPOINT_NOT_FOUND", metadata=metadata)
    if isinstance(error, RepositoryNotFoundError):
        message = f"there is neither a directory nor a Hub repository {name}; check it, and HF_TOKEN if it is private"
        return NotFoundError(message, reason="CHECKPOINT_NOT_FOUND", metadata=metadata)
    message = (
        f"there is no directory {name}, and the Hub could not be read: {error}; check HF_ENDPOINT, the network and the "
        "disk, or give a directory"
    )
    return UnavailableError(message, reason="HUB_UNAVAILABLE", metadata=metadata)


def _nowhere(location: str) -> NotFoundError:
    return NotFoundError(
        f"there is no checkpoint at {location!r}: give an existing directory, an s3://bucket/prefix or a Hub id "
        "org/name; `python -m reverie_hidream.tiny DIR` writes a tiny one",
        reason="CHECKPOINT_NOT_FOUND",
        metadata={"checkpoint": location},
    )


def _incomplete(checkpoint: Path, problems: dict[str, str]) -> ReverieError:
    remedy = _LLAMA_REMEDY if set(problems) <= set(LLAMA_PARTS) else "download it again, whole"
    details = "; ".join(f"{part}/ {problem}" for part, problem in problems.items())
    metadata = {"checkpoint": str(checkpoint), "parts": ",".join(problems)}
    return NotFoundError(
        f"checkpoint {checkpoint} is not complete ({details}); {remedy}",
        reason="CHECKPOINT_PART_MISSING",
        metadata=metadata,
    )


def _directory(checkpoint: Path, part: str) -> Path:
    """A plain Llama repository has model and tokenizer in its root."""
    nested = checkpoint / part
    if part in LLAMA_PARTS and not nested.is_dir() and (checkpoint / "config.json").is_file():
        return checkpoint
    return nested


def _problem(directory: Path, part: str) -> str | None:
    if not directory.is_dir():
        return "is missing"
    if part == "scheduler":
        return _missing_file(directory, "scheduler_config.json")
    if part in TOKENIZER_PARTS:
        found = any((directory / name).is_file() for name in _TOKENIZER_FILES)
        return None if found else f"has none of {', '.join(_TOKENIZER_FILES)}"
    return _missing_file(directory, "config.json") or _weights_problem(directory)


def _missing_file(directory: Path, name: str) -> str | None:
    return None if (directory / name).is_file() else f"has no {name}"


def _weights_problem(directory: Path) -> str | None:
    indexes = sorted(directory.glob("*.safetensors.index.json"))
    shards = {
        shard for index in indexes for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    }
    present = sorted(path.name for path in directory.glob("*.safetensors"))
    if not shards and not present:
        return "has no *.safetensors"
    missing = sorted(shards - set(present))
    if missing:
        return f"has no {', '.join(missing)}"
    truncated = [name for name in sorted(shards) or present if _is_truncated(directory / name)]
    return f"has truncated files: {', '.join(truncated)}" if truncated else None


def _is_truncated(path: Path) -> bool:
    """Compare a safetensors file's size with what its header announces."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size_bytes
        if 8 + length > size_bytes:
            return True
        header = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return bool(8 + length + max(ends, default=0) != size_bytes)
