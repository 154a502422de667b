"""The prepared manifest: what preparation left in the store for the worker to read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError
from reverie.common.v1.common_pb2 import TensorRef
from reverie_common.errors import IntegrityError

from reverie_trainer.worker.schedule import SampleGroup

MANIFEST_FORMAT = 1

Embeddings = Mapping[str, TensorRef]
"""Reference to the embedding of one text, for each encoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSample:
    """One image at its final size, with its captions."""

    dataset: str
    name: str
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    repeats: int
    """Extra passes in an epoch."""
    image_sha256: str
    latents: TensorRef
    """(2, 16, h, w) float32: mean and std of the posterior, scaled."""
    captions: tuple[Embeddings, ...]
    """At least one; one is chosen at each visit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """Everything that a job trains on."""

    samples: tuple[PreparedSample, ...]
    empty_caption: Embeddings
    """What a caption becomes when it is dropped (spec 3.5)."""

    def groups(self) -> list[SampleGroup]:
        """Samples by dataset, size and repeats, in the order in which they first appear."""
        members: dict[tuple[str, int, int, int], list[int]] = {}
        for index, sample in enumerate(self.samples):
            members.setdefault((sample.dataset, sample.width, sample.height, sample.repeats), []).append(index)
        return [
            SampleGroup(members=tuple(indices), num_passes=1 + repeats)
            for (_, _, _, repeats), indices in members.items()
        ]


def read_manifest(body: bytes) -> PreparedData:
    """Read a prepared manifest.

    Raises:
        IntegrityError: it is not one, or of another format, or holds no samples.
    """
    try:
        manifest = json.loads(body)
        if manifest["format"] != MANIFEST_FORMAT:
            raise IntegrityError(f"prepared manifest has format {manifest['format']}, expected {MANIFEST_FORMAT}")
        samples = tuple(_sample(entry) for entry in manifest["samples"])
        empty_caption = _embeddings(manifest["empty_caption"])
    except (KeyError, TypeError, ValueError, ParseError) as error:
        raise IntegrityError(f"prepared manifest is malformed: {error!r}; prepare the job again") from error
    if not samples:
        raise IntegrityError("prepared manifest holds no samples: no images detected in dataset")
    return PreparedData(samples=samples, empty_caption=empty_caption)


def _sample(entry: Mapping[str, Any]) -> PreparedSample:
    captions = tuple(_embeddings(caption) for caption in entry["captions"])
    if not captions:
        raise ValueError(f"sample {entry['name']!r} has no caption")
    return PreparedSample(
        dataset=str(entry["dataset"]),
        name=str(entry["name"]),
        width=int(entry["width"]),
        height=int(entry["height"]),
        repeats=int(entry["repeats"]),
        image_sha256=str(entry["image_sha256"]),
        latents=ParseDict(entry["latents"], TensorRef()),
        captions=captions,
    )


def _embeddings(entry: Mapping[str, Any]) -> Embeddings:
    return {name: ParseDict(ref, TensorRef()) for name, ref in sorted(entry["embeddings"].items())}
