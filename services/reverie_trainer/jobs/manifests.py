"""The immutable versions of a dataset in the store, and what is deleted with the last of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reverie.common.v1 import common_pb2
from reverie_common.storage import ObjectStore
from reverie_common.storage.keys import content_digest, dataset_manifest_key, image_key


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image with its captions."""

    name: str
    image: common_pb2.ObjectRef
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """One version of a dataset."""

    samples: tuple[Sample, ...]
    """By name."""

    @property
    def version(self) -> str:
        """Hex sha256 over the samples."""
        return content_digest({"samples": [_sample_to_json(sample) for sample in self.samples]})

    @property
    def size_bytes(self) -> int:
        """Bytes of the image files."""
        return sum(sample.image.size_bytes for sample in self.samples)


def manifest_body(manifest: Manifest) -> bytes:
    """Return a manifest's bytes: a function of the samples alone."""
    record = {"format": 1, "samples": [_sample_to_json(sample) for sample in manifest.samples]}
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def parse_manifest(body: bytes) -> Manifest:
    """Return the manifest that bytes hold."""
    return Manifest(samples=tuple(_sample_from_json(item) for item in json.loads(body)["samples"]))


def delete_contents(store: ObjectStore, name: str) -> None:
    """Delete every version of a dataset and the images that no version of another dataset has. Blocks.

    The images go first: after an interruption the versions still say what is left to delete.
    """
    prefix = _prefix(name)
    everything = prefix.removesuffix(f"{name}/")
    own, shared = set[str](), set[str]()
    versions = []
    for info in store.list(everything):
        digests = {sample.image.sha256 for sample in parse_manifest(store.get(info.key)).samples}
        if info.key.startswith(prefix):
            own |= digests
            versions.append(info.key)
        else:
            shared |= digests
    for digest in own - shared:
        store.delete(image_key(digest))
    for key in versions:
        store.delete(key)


def _prefix(name: str) -> str:
    return dataset_manifest_key(name, "").rpartition("/")[0] + "/"


def _sample_to_json(sample: Sample) -> dict[str, Any]:
    image = sample.image
    return {
        "name": sample.name,
        "image": {
            "uri": image.uri,
            "size_bytes": image.size_bytes,
            "sha256": image.sha256,
            "media_type": image.media_type,
        },
        "captions": list(sample.captions),
    }


def _sample_from_json(item: Mapping[str, Any]) -> Sample:
    return Sample(name=item["name"], image=common_pb2.ObjectRef(**item["image"]), captions=tuple(item["captions"]))
