"""The manifest of prepared samples: what a worker reads, named by everything that it was prepared from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict
from reverie.common.v1 import common_pb2
from reverie.training.v1 import job_pb2
from reverie_common.errors import ObjectNotFoundError
from reverie_common.storage import JSON_MEDIA_TYPE, ObjectStore, put_object
from reverie_common.storage.keys import content_digest, prepared_key

from reverie_trainer.jobs.preparing.buckets import Bucket, trained
from reverie_trainer.jobs.spec import DatasetChoice, JobSpec

FORMAT = 2
"""Of the manifest; the worker reads no other."""

# Raised when the same inputs would give another manifest: the crop rules, for instance.
_CODE_VERSION = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSample:
    """One image that a worker trains on, or measures."""

    source: int
    """Index in the job's datasets."""
    name: str
    width: int
    height: int
    image_sha256: str
    latents: common_pb2.TensorRef
    captions: tuple[tuple[str, ...], ...]
    """Alternatives, each in all orders of its parts that it may be shown in."""
    mask: common_pb2.TensorRef | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Everything that a worker reads."""

    choices: tuple[DatasetChoice, ...]
    samples: tuple[PreparedSample, ...]
    embeddings: Mapping[str, Mapping[str, common_pb2.TensorRef]]
    """By prompt, the empty one included, and by name of the encoder."""
    buckets: tuple[Bucket, ...]
    encoders: Mapping[str, str]
    """Fingerprints by name: what embeddings that are made later must depend on too."""
    report: job_pb2.PreparationReport
    """What people are told; what was cached is left out of the manifest, which is the same whoever makes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredManifest:
    """A manifest that is in the store."""

    reference: common_pb2.ObjectRef
    buckets: tuple[Bucket, ...]
    report: job_pb2.PreparationReport


def prepared_digest(
    spec: JobSpec,
    dataset_versions: Mapping[str, str],
    *,
    encoder_fingerprints: Mapping[str, str],
    vae_fingerprint: str,
    max_pixels: int,
) -> str:
    """Return the digest over everything that prepared samples depend on."""
    return content_digest(
        {
            "code_version": _CODE_VERSION,
            "datasets": [_choice_record(choice, dataset_versions[choice.dataset]) for choice in spec.datasets],
            "rounding": spec.aspect_bucket_rounding,
            "encoders": dict(encoder_fingerprints),
            "embedding_storage": spec.embedding_storage,
            "vae": vae_fingerprint,
            "max_pixels": max_pixels,
            # Only where something is drawn; other jobs share whatever their seeds are.
            "seed": spec.seed if any(_depends_on_seed(choice) for choice in spec.datasets) else None,
        }
    )


def save_prepared(store: ObjectStore, digest: str, prepared: Prepared) -> StoredManifest:
    """Write a manifest; if somebody else was faster, theirs is taken. Blocks."""
    reference = put_object(store, prepared_key(digest), _body(prepared), JSON_MEDIA_TYPE)
    return StoredManifest(reference=reference, buckets=prepared.buckets, report=prepared.report)


def load_prepared(store: ObjectStore, digest: str) -> StoredManifest | None:
    """Return the manifest of a digest, None when there is none. Its report says that all was cached. Blocks."""
    key = prepared_key(digest)
    try:
        body = store.get(key)
    except ObjectNotFoundError:
        return None
    record = json.loads(body)
    report = ParseDict(record["report"], job_pb2.PreparationReport())
    report.num_images_cached = report.num_images
    report.num_prompts_cached = report.num_prompts
    return StoredManifest(
        reference=put_object(store, key, body, JSON_MEDIA_TYPE),
        buckets=tuple(Bucket(**bucket) for bucket in record["buckets"]),
        report=report,
    )


def _depends_on_seed(choice: DatasetChoice) -> bool:
    return choice.crop_style == "random" or choice.crop_aspect == "random" or choice.max_num_samples > 0


def _choice_record(choice: DatasetChoice, version: str) -> dict[str, Any]:
    """Everything that is said of a dataset, its weight and steps included: the manifest carries them to the worker."""
    return {"version": version, **asdict(choice)}


def _body(prepared: Prepared) -> bytes:
    report = job_pb2.PreparationReport()
    report.CopyFrom(prepared.report)
    report.ClearField("num_images_cached")
    report.ClearField("num_prompts_cached")
    references = {
        prompt: {name: _to_json(reference) for name, reference in sorted(by_encoder.items())}
        for prompt, by_encoder in prepared.embeddings.items()
    }
    record = {
        "format": FORMAT,
        "datasets": [_source_record(choice) for choice in prepared.choices],
        "samples": [_sample_record(sample, references) for sample in prepared.samples],
        "empty_caption": _caption_record("", references),
        "encoders": dict(prepared.encoders),
        "buckets": [asdict(bucket) for bucket in prepared.buckets],
        "report": _to_json(report),
    }
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _source_record(choice: DatasetChoice) -> dict[str, Any]:
    """What a worker needs to know of one entry of the job's datasets."""
    names = (
        "dataset",
        "role",
        "repeats",
        "probability",
        "start_step",
        "end_step",
        "timestep_sampling_offset",
        "mask_type",
    )
    return {name: getattr(choice, name) for name in names}


def _sample_record(sample: PreparedSample, references: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    record = {
        "source": sample.source,
        "name": sample.name,
        "width": sample.width,
        "height": sample.height,
        "image_sha256": sample.image_sha256,
        "latents": _to_json(sample.latents),
        "captions": [[_caption_record(text, references) for text in orders] for orders in sample.captions],
    }
    return record if sample.mask is None else {**record, "mask": _to_json(sample.mask)}


def _caption_record(text: str, references: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    # What is encoded on demand has no references yet.
    return {"text": text, "embeddings": references.get(text, {})}


def _to_json(message: common_pb2.TensorRef | job_pb2.PreparationReport) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)


def bucket_reports(buckets: Sequence[Bucket]) -> list[job_pb2.BucketReport]:
    """Return the trained buckets as people see them: all datasets together, largest first."""
    counts: dict[tuple[int, int], int] = {}
    for bucket in trained(buckets):
        size = (bucket.width, bucket.height)
        counts[size] = counts.get(size, 0) + bucket.num_images
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [job_pb2.BucketReport(width=width, height=height, num_images=count) for (width, height), count in ordered]
