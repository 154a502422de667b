"""The prepared manifest: read as preparation writes it, grouped by dataset and size."""

import json
from typing import Any

import pytest
from reverie_common.errors import IntegrityError
from reverie_trainer.worker.samples import read_manifest
from reverie_trainer.worker.schedule import SampleGroup

REF = {"uri": "s3://bucket/key", "name": "t", "dtype": "F32", "shape": [2], "size_bytes": "8", "sha256": "ab"}


def _sample(dataset: str = "cats", width: int = 64, repeats: int = 0, **changes: Any) -> dict[str, Any]:
    caption = {"text": "a cat", "embeddings": {"t5": REF}}
    fields = {"dataset": dataset, "name": "a.png", "width": width, "height": 64, "repeats": repeats}
    return {**fields, "image_sha256": "00", "latents": REF, "captions": [caption], **changes}


def _body(*samples: dict[str, Any], **changes: Any) -> bytes:
    manifest = {"format": 1, "samples": list(samples), "empty_caption": {"embeddings": {"t5": REF}}, "buckets": []}
    return json.dumps({**manifest, **changes}).encode()


def test_groups_are_datasets_of_one_size() -> None:
    data = read_manifest(
        _body(_sample(), _sample("dogs", repeats=2), _sample(width=128), _sample(), _sample("dogs", repeats=2))
    )
    assert data.groups() == [
        SampleGroup(members=(0, 3), num_passes=1),
        SampleGroup(members=(1, 4), num_passes=3),
        SampleGroup(members=(2,), num_passes=1),
    ]


def test_references_are_read() -> None:
    data = read_manifest(_body(_sample()))
    assert data.samples[0].latents.uri == "s3://bucket/key"
    assert data.samples[0].captions[0]["t5"].size_bytes == 8
    assert data.empty_caption["t5"].sha256 == "ab"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"no json", "malformed"),
        (b"[]", "malformed"),
        (_body(_sample(), format=2), "format 2"),
        (_body(), "no images detected in dataset"),
        (_body(_sample(captions=[])), "no caption"),
        (_body(_sample(latents={"uri": 5})), "malformed"),
    ],
    ids=["text", "list", "format", "empty", "uncaptioned", "reference"],
)
def test_what_is_no_manifest_is_refused(body: bytes, told: str) -> None:
    with pytest.raises(IntegrityError, match=told):
        read_manifest(body)
