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
    mask: common_pb2.ObjectRef | None = None
    """Which parts of the image count; None is all of them."""

    @property
    def files(self) -> tuple[common_pb2.ObjectRef, ...]:
        """The image and, where there is one, its mask."""
        return (self.image,) if self.mask is None else (self.image, self.mask)


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
        """Bytes of the image files, masks included."""
        return sum(file.size_bytes for sample in self.samples for file in sample.files)


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
        samples = parse_manifest(store.get(info.key)).samples
        digests = {file.sha256 for sample in samples for file in sample.files if is_uploaded(file, store)}
        if info.key.startswith(prefix):
            own |= digests
            versions.append(info.key)
        else:
            shared |= digests
    for digest in own - shared:
        store.delete(image_key(digest))
    for key in versions:
        store.delete(key)


def is_uploaded(file: common_pb2.ObjectRef, store: ObjectStore) -> bool:
    """Whether a file is one of ours; others were imported and are read where they are."""
    return file.uri == store.uri(image_key(file.sha256))


def _prefix(name: str) -> str:
    return dataset_manifest_key(name, "").rpartition("/")[0] + "/"


def _sample_to_json(sample: Sample) -> dict[str, Any]:
    record: dict[str, Any] = {
        "name": sample.name,
        "image": _file_to_json(sample.image),
        "captions": list(sample.captions),
    }
    # Only where there is one, so that versions from before there were masks keep their digests.
    if sample.mask is not None:
        record["mask"] = _file_to_json(sample.mask)
    return record


def _file_to_json(file: common_pb2.ObjectRef) -> dict[str, Any]:
    return {
        "uri": file.uri,
        "size_bytes": file.size_bytes,
        "sha256": file.sha256,
        "media_type": file.media_type,
    }


def _sample_from_json(item: Mapping[str, Any]) -> Sample:
    return Sample(
        name=item["name"],
        image=common_pb2.ObjectRef(**item["image"]),
        captions=tuple(item["captions"]),
        mask=common_pb2.ObjectRef(**item["mask"]) if "mask" in item else None,
    )
