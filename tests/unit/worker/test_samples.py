"""The prepared manifest: read as preparation writes it, grouped by dataset and size."""

import json
from typing import Any

import pytest
from reverie_common.errors import IntegrityError
from reverie_trainer.jobs.preparing.epochs import StepRange
from reverie_trainer.jobs.spec import JobSpec, Optimization
from reverie_trainer.worker.samples import read_manifest
from reverie_trainer.worker.schedule import SampleGroup

REF = {"uri": "s3://bucket/key", "name": "t", "dtype": "F32", "shape": [2], "size_bytes": "8", "sha256": "ab"}
CAPTION = {"text": "a cat", "embeddings": {"t5": REF}}
SPEC = JobSpec(optimization=Optimization(batch_size=2, gradient_accumulation_steps=3))


def _source(dataset: str = "cats", **changes: Any) -> dict[str, Any]:
    plain = {"dataset": dataset, "role": "train", "repeats": 0, "probability": 1.0, "start_step": 0, "end_step": 0}
    return {**plain, "timestep_sampling_offset": 0.0, "mask_type": "none", **changes}


def _sample(source: int = 0, width: int = 64, **changes: Any) -> dict[str, Any]:
    fields = {"source": source, "name": "a.png", "width": width, "height": 64}
    return {**fields, "image_sha256": "00", "latents": REF, "captions": [[CAPTION]], **changes}


def _body(*samples: dict[str, Any], **changes: Any) -> bytes:
    sources = [_source(), _source("dogs", repeats=2)]
    manifest = {"format": 2, "datasets": sources, "samples": list(samples), "empty_caption": CAPTION, "buckets": []}
    return json.dumps({**manifest, **changes}).encode()


def test_groups_are_datasets_of_one_size() -> None:
    data = read_manifest(_body(_sample(), _sample(1), _sample(width=128), _sample(), _sample(1)))
    cats, dogs = data.schedule(SPEC)
    assert cats.groups == (SampleGroup(members=(0, 3), num_passes=1), SampleGroup(members=(2,), num_passes=1))
    assert dogs.groups == (SampleGroup(members=(1, 4), num_passes=3),)


def test_a_dataset_listed_twice_is_two_sources_with_their_steps() -> None:
    sources = [_source(end_step=500), _source(start_step=501, probability=2.0)]
    data = read_manifest(_body(_sample(0), _sample(1, width=128), datasets=sources))
    first, second = data.schedule(SPEC)
    assert (first.steps, second.steps) == (StepRange(first=1, last=500), StepRange(first=501))
    assert (first.groups[0].members, second.groups[0].members) == ((0,), (1,))
    assert (first.probability, second.probability) == (1.0, 2.0)


def test_oversubscription_shows_small_groups_as_often_as_a_step_needs() -> None:
    data = read_manifest(_body(_sample(), _sample(1), _sample(width=128), _sample()))
    spec = JobSpec(optimization=SPEC.optimization, allow_dataset_oversubscription=True)
    cats, dogs = data.schedule(spec)
    # Six samples in a step: two images three times, one image six times.
    assert [group.num_passes for group in (*cats.groups, *dogs.groups)] == [3, 6, 6]


def test_evaluation_samples_are_in_no_step_and_come_by_name() -> None:
    sources = [_source(), _source("held-out", role="evaluation")]
    samples = [_sample(1, name="b.png"), _sample(), _sample(1, name="a.png")]
    data = read_manifest(_body(*samples, datasets=sources))
    assert [group.members for dataset in data.schedule(SPEC) for group in dataset.groups] == [(1,)]
    assert data.evaluation_datasets == ("held-out",)
    assert data.evaluation_samples("held-out") == [2, 0]
    assert [sample.dataset for sample in data.trained_samples] == ["cats"]


def test_references_are_read() -> None:
    data = read_manifest(_body(_sample(mask=REF)))
    assert data.samples[0].latents.uri == "s3://bucket/key"
    assert data.samples[0].captions[0][0].embeddings["t5"].size_bytes == 8
    assert data.samples[0].mask is not None
    assert data.samples[0].mask.sha256 == "ab"
    assert data.empty_caption.embeddings["t5"].sha256 == "ab"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"no json", "malformed"),
        (b"[]", "malformed"),
        (_body(_sample(), format=1), "format 1"),
        (_body(), "no images detected in dataset"),
        (_body(_sample(captions=[])), "no caption"),
        (_body(_sample(captions=[[]])), "no caption"),
        (_body(_sample(latents={"uri": 5})), "malformed"),
        (_body(_sample(source=7)), "malformed"),
    ],
    ids=["text", "list", "format", "empty", "uncaptioned", "unordered", "reference", "source"],
)
def test_what_is_no_manifest_is_refused(body: bytes, told: str) -> None:
    with pytest.raises(IntegrityError, match=told):
        read_manifest(body)
