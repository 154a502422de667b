"""A job's checkpoints where the truth is: a checkpoint exists when its manifest does. Everything here blocks.

The listing and not the reported events decide: a worker that was killed between writing a manifest and reporting it has
saved nonetheless.
"""

import hashlib
import json
import re
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict
from reverie.common.v1 import common_pb2
from reverie_common.storage import JSON_MEDIA_TYPE, ObjectStore
from reverie_common.storage.keys import checkpoint_manifest_key, checkpoint_part_key, checkpoint_prefix

_MANIFEST = re.compile(r"(\d+)/manifest\.json")


def newest_checkpoint(store: ObjectStore, job_id: str) -> common_pb2.ObjectRef | None:
    """Return the manifest of a job's newest checkpoint, None when there is none."""
    steps = checkpoint_steps(store, job_id)
    if not steps:
        return None
    key = checkpoint_manifest_key(job_id, steps[-1])
    body = store.get(key)
    return common_pb2.ObjectRef(
        uri=store.uri(key),
        size_bytes=len(body),
        sha256=hashlib.sha256(body).hexdigest(),
        media_type=JSON_MEDIA_TYPE,
    )


def checkpoint_steps(store: ObjectStore, job_id: str) -> list[int]:
    """Return the steps that a job can be resumed from, in order."""
    prefix = checkpoint_prefix(job_id)
    matches = (_MANIFEST.fullmatch(info.key.removeprefix(prefix)) for info in store.list(prefix))
    return sorted(int(match[1]) for match in matches if match is not None)


def forget_later_checkpoints(store: ObjectStore, job_id: str, step: int) -> None:
    """Delete a job's checkpoints after a step; the manifest goes first, so that each exists whole or not at all."""
    prefix = checkpoint_prefix(job_id)
    keys = [info.key for info in store.list(prefix) if int(info.key.removeprefix(prefix).split("/", 1)[0]) > step]
    for key in sorted(keys, key=lambda key: not key.endswith("/manifest.json")):
        store.delete(key)


def copy_checkpoint(store: ObjectStore, source_job_id: str, step: int, job_id: str, *, adapter_only: bool) -> None:
    """Make another job's checkpoint the first one of a job, so that it stays when the other job's is deleted.

    With `adapter_only` it becomes that of step 0: the worker takes its adapter, and no step of it counts as done.
    """
    record: dict[str, Any] = json.loads(store.get(checkpoint_manifest_key(source_job_id, step)))
    own_step = 0 if adapter_only else step
    for name, part in record["parts"].items():
        reference = ParseDict(part, common_pb2.ObjectRef())
        key = checkpoint_part_key(job_id, own_step, name, reference.sha256)
        store.copy(store.key_of(reference.uri), key)
        reference.uri = store.uri(key)
        record["parts"][name] = MessageToDict(reference, preserving_proto_field_name=True)
    record["step"] = own_step
    # Pictures that the other job still waits for are not this one's.
    record["scalars"] = {name: value for name, value in record["scalars"].items() if name != "pictures"}
    record["scalars"]["start"] = {"job_id": source_job_id, "step": step, "adapter_only": adapter_only}
    body = json.dumps(record, sort_keys=True, indent=1).encode()
    store.create(checkpoint_manifest_key(job_id, own_step), body, media_type=JSON_MEDIA_TYPE)
