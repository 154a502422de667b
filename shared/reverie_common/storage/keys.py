"""Every object key in the project.

Derived objects are named by everything they depend on: `v1/<kind>/<model fingerprint>/<2 hex>/<digest>`. The two hex
digits bound the size of a directory in stores that have directories, and split a listing.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

ON_DEMAND_OBJECTS = 256
"""Embeddings that an encoder service keeps for a while by default."""

JSON = None | bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"]


def content_digest(record: Mapping[str, JSON]) -> str:
    """Hex sha256 of a record's canonical JSON: sorted keys, no spaces, UTF-8.

    Raises:
        ValueError: the record holds NaN or an infinity, which JSON cannot tell apart reliably.
    """
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def image_key(sha256: str) -> str:
    """An uploaded image file, named by its bytes."""
    return f"v1/image/{_split(sha256)}"


def inspection_key(image_sha256: str, code_version: str) -> str:
    """What was found when an image was opened, named by the image and the version of the code that looked."""
    return f"v1/inspection/{code_version}/{_split(image_sha256)}"


def text_key(encoder_fingerprint: str, digest: str) -> str:
    """One encoder's embedding of one text."""
    return f"v1/text/{encoder_fingerprint}/{_split(digest)}"


def on_demand_key(encoder_fingerprint: str, digest: str) -> str:
    """One encoder's embedding of one text that is kept for a while only."""
    return f"{on_demand_prefix(encoder_fingerprint)}{_split(digest)}"


def on_demand_prefix(encoder_fingerprint: str) -> str:
    """Prefix of everything that one encoder keeps for a while only."""
    return f"v1/on_demand/{encoder_fingerprint}/"


def latent_key(vae_fingerprint: str, digest: str) -> str:
    """The posterior of one image under one crop plan."""
    return f"v1/latent/{vae_fingerprint}/{_split(digest)}"


def mask_key(digest: str) -> str:
    """One mask at latent size under one crop plan."""
    return f"v1/mask/{_split(digest)}"


def sample_key(digest: str) -> str:
    """One drawn picture."""
    return f"v1/sample/{_split(digest)}"


def adapter_snapshot_key(sha256: str) -> str:
    """An adapter file that a worker hands to the sampler, named by its bytes."""
    return f"v1/adapter/{_split(sha256)}"


def dataset_manifest_key(dataset_id: str, version: str | int) -> str:
    """The immutable list of one dataset version's samples."""
    return f"v1/dataset/{dataset_id}/{version}.json"


def prepared_key(digest: str) -> str:
    """The list of everything that a worker reads, named by all that it was prepared from."""
    return f"v1/prepared/{_split(digest)}.json"


def job_prefix(job_id: str) -> str:
    """Prefix of everything that belongs to one job alone."""
    return f"v1/job/{job_id}/"


def checkpoint_prefix(job_id: str) -> str:
    """Prefix of a job's checkpoint manifests and parts."""
    return f"{job_prefix(job_id)}checkpoint/"


def checkpoint_manifest_key(job_id: str, step: int) -> str:
    """The manifest whose existence makes a checkpoint exist; steps sort as text."""
    return f"{checkpoint_prefix(job_id)}{step:09d}/manifest.json"


def checkpoint_part_key(job_id: str, step: int, name: str, sha256: str) -> str:
    """One part of a checkpoint. The digest keeps a part of a second attempt from meeting that of the first."""
    return f"{checkpoint_prefix(job_id)}{step:09d}/{name}/{sha256}"


def artifact_key(job_id: str, name: str, sha256: str) -> str:
    """A result of a job for people, for instance `adapter/pytorch_lora_weights.safetensors`."""
    return f"{job_prefix(job_id)}artifact/{sha256}/{name}"


def reference_key(key: str) -> str:
    """The small object beside a tensor object that says what is in it; see refs.py."""
    return f"{key}.ref"


def _split(digest: str) -> str:
    return f"{digest[:2]}/{digest}"
