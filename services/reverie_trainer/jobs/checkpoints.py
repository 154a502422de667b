"""Finding a job's newest checkpoint where the truth is: a checkpoint exists when its manifest does."""

import hashlib
import re

from reverie.common.v1 import common_pb2
from reverie_common.storage import JSON_MEDIA_TYPE, ObjectStore
from reverie_common.storage.keys import checkpoint_prefix

_MANIFEST = re.compile(r"(\d+)/manifest\.json")


def newest_checkpoint(store: ObjectStore, job_id: str) -> common_pb2.ObjectRef | None:
    """Return the manifest of a job's newest checkpoint, None when there is none. Blocks.

    The listing and not the reported events decide: a worker that was killed between writing a manifest and reporting it
    has saved nonetheless.
    """
    prefix = checkpoint_prefix(job_id)
    manifests = {}
    for info in store.list(prefix):
        match = _MANIFEST.fullmatch(info.key.removeprefix(prefix))
        if match is not None:
            manifests[int(match[1])] = info.key
    if not manifests:
        return None
    key = manifests[max(manifests)]
    body = store.get(key)
    return common_pb2.ObjectRef(
        uri=store.uri(key),
        size_bytes=len(body),
        sha256=hashlib.sha256(body).hexdigest(),
        media_type=JSON_MEDIA_TYPE,
    )
