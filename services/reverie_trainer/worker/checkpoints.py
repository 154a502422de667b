"""Checkpoints in the store: written in the background, complete by one last write, read back to resume from.

A checkpoint is its manifest; what has none does not exist. The adapter file is what LyCORIS loads; the state holds the
raw adapter, its scalar apart, and the optimiser, so that a resumed run continues exactly (spec 4.7).
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from reverie.common.v1.common_pb2 import ObjectRef
from reverie_common.errors import IntegrityError, ReverieError
from reverie_common.storage import (
    JSON_MEDIA_TYPE,
    ObjectStore,
    RawTensor,
    get_object,
    pack_tensors,
    put_object,
    unpack_tensors,
)
from reverie_common.storage.keys import checkpoint_manifest_key, checkpoint_part_key, checkpoint_prefix

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 1
ADAPTER, STATE, METRICS = "adapter", "state", "metrics"
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointContents:
    """What a checkpoint holds, free of anything that training goes on to change."""

    step: int
    """Optimiser steps done."""
    adapter_file: bytes
    """As exported (spec 4.6)."""
    state: Mapping[str, RawTensor]
    """Raw adapter and optimiser."""
    metrics: bytes
    """The metrics of every step so far, a JSON object a line."""
    scalars: Mapping[str, Any] = field(default_factory=dict)
    """Small facts that a resume needs, as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedCheckpoint:
    """A checkpoint that exists."""

    step: int
    adapter: ObjectRef
    state: ObjectRef
    metrics: ObjectRef
    scalars: Mapping[str, Any]


def write_checkpoint(store: ObjectStore, job_id: str, contents: CheckpointContents) -> SavedCheckpoint:
    """Write the parts, then the manifest. Blocks; a step that is already saved is kept as it is.

    Raises:
        ReverieError: the store is away, full or refuses us; what was written is not a checkpoint.
    """
    parts = {
        ADAPTER: contents.adapter_file,
        STATE: pack_tensors(contents.state),
        METRICS: contents.metrics,
    }
    refs = {name: _put_part(store, job_id, contents.step, name, body) for name, body in parts.items()}
    manifest = {
        "format": CHECKPOINT_FORMAT,
        "step": contents.step,
        "parts": {name: MessageToDict(ref, preserving_proto_field_name=True) for name, ref in refs.items()},
        "scalars": dict(contents.scalars),
    }
    key = checkpoint_manifest_key(job_id, contents.step)
    body = json.dumps(manifest, sort_keys=True, indent=1).encode()
    # A worker that died between this write and its report is repeated: the first manifest stays.
    return _parse_manifest(body if store.create(key, body, media_type=JSON_MEDIA_TYPE) else store.get(key))


def read_checkpoint(store: ObjectStore, manifest: ObjectRef) -> SavedCheckpoint:
    """Read the manifest that the trainer named."""
    return _parse_manifest(get_object(store, manifest))


def read_state(store: ObjectStore, checkpoint: SavedCheckpoint) -> dict[str, RawTensor]:
    """Read the raw adapter and the optimiser of a checkpoint."""
    return unpack_tensors(get_object(store, checkpoint.state))


def prune_checkpoints(store: ObjectStore, job_id: str, keep: int) -> list[int]:
    """Delete all but the newest `keep` checkpoints, and what was left unfinished before them; 0 keeps all.

    Returns the steps of the checkpoints that were deleted.
    """
    if keep <= 0:
        return []
    by_step: dict[int, list[str]] = {}
    for item in store.list(checkpoint_prefix(job_id)):
        step_text = item.key.removeprefix(checkpoint_prefix(job_id)).split("/", 1)[0]
        by_step.setdefault(int(step_text), []).append(item.key)
    complete = sorted(step for step, keys in by_step.items() if _manifest_of(job_id, step) in keys)
    oldest_kept = complete[-keep:][0] if complete else 0
    for step in sorted(step for step in by_step if step < oldest_kept):
        # The manifest goes first: a checkpoint exists whole or not at all.
        for key in sorted(by_step[step], key=lambda key: not key.endswith(MANIFEST_NAME)):
            store.delete(key)
    return [step for step in complete if step < oldest_kept]


def _manifest_of(job_id: str, step: int) -> str:
    return checkpoint_manifest_key(job_id, step)


def _put_part(store: ObjectStore, job_id: str, step: int, name: str, body: bytes) -> ObjectRef:
    return put_object(store, checkpoint_part_key(job_id, step, name, hashlib.sha256(body).hexdigest()), body)


def _parse_manifest(body: bytes) -> SavedCheckpoint:
    try:
        manifest = json.loads(body)
        if manifest["format"] != CHECKPOINT_FORMAT:
            raise IntegrityError(f"checkpoint has format {manifest['format']}, expected {CHECKPOINT_FORMAT}")
        refs = {name: ParseDict(manifest["parts"][name], ObjectRef()) for name in (ADAPTER, STATE, METRICS)}
        return SavedCheckpoint(
            step=int(manifest["step"]),
            adapter=refs[ADAPTER],
            state=refs[STATE],
            metrics=refs[METRICS],
            scalars=manifest["scalars"],
        )
    except (KeyError, TypeError, ValueError, ParseError) as error:
        raise IntegrityError(f"checkpoint manifest is malformed: {error!r}") from error


class CheckpointSaver:
    """Writes checkpoints in one background thread; at most one waits while another is written."""

    def __init__(
        self,
        store: ObjectStore,
        job_id: str,
        *,
        keep: int,
        on_saved: Callable[[SavedCheckpoint], None],
        on_failed: Callable[[int, ReverieError], None],
    ) -> None:
        """Start the thread.

        Args:
            keep: newest checkpoints to keep; 0 keeps all.
            on_saved, on_failed: called in the background thread.
        """
        self._store = store
        self._job_id = job_id
        self._keep = keep
        self._on_saved = on_saved
        self._on_failed = on_failed
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._room = threading.BoundedSemaphore(2)

    def save(self, contents: CheckpointContents) -> Future[SavedCheckpoint | None]:
        """Write in the background. Blocks while two others are not written yet, which bounds the memory they take."""
        self._room.acquire()
        return self._executor.submit(self._save, contents)

    def close(self) -> None:
        """Wait until everything is written."""
        self._executor.shutdown(wait=True)

    def _save(self, contents: CheckpointContents) -> SavedCheckpoint | None:
        try:
            saved = write_checkpoint(self._store, self._job_id, contents)
            self._on_saved(saved)
            prune_checkpoints(self._store, self._job_id, self._keep)
        except ReverieError as error:
            # A save that fails costs progress only if the worker dies before the next one; training goes on.
            logger.warning("checkpoint at step %d was not saved: %s", contents.step, error.message)
            self._on_failed(contents.step, error)
            return None
        else:
            return saved
        finally:
            self._room.release()
