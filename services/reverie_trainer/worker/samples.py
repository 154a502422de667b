"""The prepared manifest: what preparation left in the store for the worker to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError
from reverie.common.v1.common_pb2 import TensorRef
from reverie_common.errors import IntegrityError

from reverie_trainer.jobs.preparing.buckets import EVALUATION, scheduled_passes
from reverie_trainer.jobs.preparing.epochs import StepRange
from reverie_trainer.jobs.preparing.prepared import FORMAT as MANIFEST_FORMAT
from reverie_trainer.jobs.spec import JobSpec
from reverie_trainer.worker.schedule import SampleGroup, ScheduledDataset

Embeddings = Mapping[str, TensorRef]
"""Reference to the embedding of one text, for each encoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """One text and what the encoders made of it."""

    text: str
    embeddings: Embeddings
    """Empty where the encoders are asked on demand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One entry of the job's datasets; the same dataset may be listed several times."""

    dataset: str
    role: str = "train"
    """`train`, `regularisation` or `evaluation`."""
    repeats: int = 0
    """Extra passes in an epoch."""
    probability: float = 1.0
    steps: StepRange = field(default_factory=StepRange)
    """When it is trained on."""
    timestep_sampling_offset: float = 0.0
    mask_type: str = "none"

    @property
    def is_regularisation(self) -> bool:
        """Whether the base model's own prediction is the target."""
        return self.role == "regularisation"

    @property
    def is_evaluation(self) -> bool:
        """Whether it is only measured."""
        return self.role == EVALUATION


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSample:
    """One image at its final size, with its captions."""

    source: int = 0
    """Index of its source."""
    dataset: str
    name: str
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    image_sha256: str
    latents: TensorRef
    """(2, 16, h, w) float32: mean and std of the posterior, scaled."""
    captions: tuple[tuple[Caption, ...], ...]
    """At least one, of which one is chosen at each visit; each in all orders of its parts that it may be shown in."""
    mask: TensorRef | None = None
    """(1, h, w) float32, 0 to 1; None is all of the picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """Everything that a job trains on, and what it is measured on."""

    sources: tuple[Source, ...]
    samples: tuple[PreparedSample, ...]
    empty_caption: Caption
    """What a caption becomes when it is dropped (spec 3.5)."""
    encoders: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints by name: what embeddings that are asked for on demand must be made by."""

    @property
    def trained_samples(self) -> tuple[PreparedSample, ...]:
        """The samples that steps are made of."""
        return tuple(sample for sample in self.samples if not self.sources[sample.source].is_evaluation)

    @property
    def evaluation_datasets(self) -> tuple[str, ...]:
        """Names of the datasets that are only measured, in the order of the job."""
        return tuple(dict.fromkeys(source.dataset for source in self.sources if source.is_evaluation))

    def evaluation_samples(self, dataset: str) -> list[int]:
        """Indices of the samples of an evaluation dataset, by name: the same ones in the same order every time."""
        found = [
            index
            for index, sample in enumerate(self.samples)
            if sample.dataset == dataset and self.sources[sample.source].is_evaluation
        ]
        return sorted(found, key=lambda index: (self.samples[index].name, index))

    def schedule(self, spec: JobSpec) -> list[ScheduledDataset]:
        """What a Schedule is made of: the sources that are trained on, in order, in groups of one size each."""
        return [
            ScheduledDataset(
                groups=tuple(self._groups(index, source, spec)), probability=source.probability, steps=source.steps
            )
            for index, source in enumerate(self.sources)
            if not source.is_evaluation
        ]

    def _groups(self, source_index: int, source: Source, spec: JobSpec) -> list[SampleGroup]:
        """Samples by size, in the order in which sizes first appear."""
        members: dict[tuple[int, int], list[int]] = {}
        for index, sample in enumerate(self.samples):
            if sample.source == source_index:
                members.setdefault((sample.width, sample.height), []).append(index)
        return [
            SampleGroup(members=tuple(indices), num_passes=scheduled_passes(len(indices), source.repeats, spec))
            for indices in members.values()
        ]


def read_manifest(body: bytes) -> PreparedData:
    """Read a prepared manifest.

    Raises:
        IntegrityError: it is not one, or of another format, or holds no samples.
    """
    try:
        manifest = json.loads(body)
        if manifest["format"] != MANIFEST_FORMAT:
            raise IntegrityError(
                f"prepared manifest has format {manifest['format']}, expected {MANIFEST_FORMAT}; prepare the job again"
            )
        sources = tuple(_source(entry) for entry in manifest["datasets"])
        samples = tuple(_sample(entry, sources) for entry in manifest["samples"])
        empty_caption = _caption(manifest["empty_caption"])
        encoders = {str(name): str(value) for name, value in manifest.get("encoders", {}).items()}
    except (KeyError, IndexError, TypeError, ValueError, ParseError) as error:
        raise IntegrityError(f"prepared manifest is malformed: {error!r}; prepare the job again") from error
    if not samples:
        raise IntegrityError("prepared manifest holds no samples: no images detected in dataset")
    return PreparedData(sources=sources, samples=samples, empty_caption=empty_caption, encoders=encoders)


def _source(entry: Mapping[str, Any]) -> Source:
    return Source(
        dataset=str(entry["dataset"]),
        role=str(entry["role"]),
        repeats=int(entry["repeats"]),
        probability=float(entry["probability"]),
        steps=StepRange(first=max(1, int(entry["start_step"])), last=int(entry["end_step"]) or None),
        timestep_sampling_offset=float(entry["timestep_sampling_offset"]),
        mask_type=str(entry["mask_type"]),
    )


def _sample(entry: Mapping[str, Any], sources: Sequence[Source]) -> PreparedSample:
    captions = tuple(tuple(_caption(order) for order in orders) for orders in entry["captions"])
    if not captions or not all(captions):
        raise ValueError(f"sample {entry['name']!r} has no caption")
    source = int(entry["source"])
    return PreparedSample(
        source=source,
        dataset=sources[source].dataset,
        name=str(entry["name"]),
        width=int(entry["width"]),
        height=int(entry["height"]),
        image_sha256=str(entry["image_sha256"]),
        latents=ParseDict(entry["latents"], TensorRef()),
        captions=captions,
        mask=ParseDict(entry["mask"], TensorRef()) if "mask" in entry else None,
    )


def _caption(entry: Mapping[str, Any]) -> Caption:
    embeddings = {name: ParseDict(ref, TensorRef()) for name, ref in sorted(entry["embeddings"].items())}
    return Caption(text=str(entry["text"]), embeddings=embeddings)
