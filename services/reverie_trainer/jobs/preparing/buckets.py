"""How many images share one size, how many batches that makes, and what to tell when it makes none (spec 6.5, 6.6)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from reverie_trainer.jobs.preparing.epochs import EpochClock, StepRange
from reverie_trainer.jobs.spec import DatasetChoice, JobSpec

EVALUATION = "evaluation"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """How many images of one entry of the job's datasets share one size."""

    source: int
    """Index in the job's datasets: one dataset may be listed several times."""
    dataset: str
    role: str = "train"
    repeats: int
    """Extra passes in each epoch."""
    width: int
    height: int
    num_images: int

    @property
    def num_samples(self) -> int:
        """Samples in one epoch."""
        return self.num_images * (self.repeats + 1)

    def num_batches(self, batch_size: int) -> int:
        """Micro-batches in one epoch; an underfilled last one is topped up (spec 6.5)."""
        return math.ceil(self.num_samples / batch_size)


def count_buckets(source: int, choice: DatasetChoice, sizes: Sequence[tuple[int, int]]) -> list[Bucket]:
    """Count images by (width, height), largest count first, then by size."""
    counts: dict[tuple[int, int], int] = {}
    for size in sizes:
        counts[size] = counts.get(size, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [
        Bucket(
            source=source,
            dataset=choice.dataset,
            role=choice.role,
            repeats=choice.repeats,
            width=width,
            height=height,
            num_images=count,
        )
        for (width, height), count in ordered
    ]


def trained(buckets: Sequence[Bucket]) -> list[Bucket]:
    """Return the buckets that steps are made of: those of evaluation datasets are only measured."""
    return [bucket for bucket in buckets if bucket.role != EVALUATION]


def scheduled_buckets(buckets: Sequence[Bucket], spec: JobSpec) -> list[Bucket]:
    """Return the buckets that steps are made of, with the repeats that allow_dataset_oversubscription gives them."""
    return [replace(bucket, repeats=_scheduled_repeats(bucket, spec)) for bucket in trained(buckets)]


def scheduled_passes(num_images: int, repeats: int, spec: JobSpec) -> int:
    """Return how often an epoch shows each image of a bucket: 1 + repeats, or as often as one step needs."""
    if not spec.allow_dataset_oversubscription:
        return 1 + repeats
    return 1 + max(repeats, minimum_repeats(num_images, spec.optimization.effective_batch))


def _scheduled_repeats(bucket: Bucket, spec: JobSpec) -> int:
    return scheduled_passes(bucket.num_images, bucket.repeats, spec) - 1


def epoch_clock(buckets: Sequence[Bucket], spec: JobSpec) -> EpochClock:
    """Return how steps and epochs of a job go together."""
    batches = [0] * len(spec.datasets)
    for bucket in scheduled_buckets(buckets, spec):
        batches[bucket.source] += bucket.num_batches(spec.optimization.batch_size)
    used = [index for index, choice in enumerate(spec.datasets) if choice.role != EVALUATION]
    return EpochClock(
        ranges=[step_range(spec.datasets[index]) for index in used],
        num_batches=[batches[index] for index in used],
        num_accumulated=spec.optimization.gradient_accumulation_steps,
    )


def with_max_steps(spec: JobSpec, buckets: Sequence[Bucket]) -> JobSpec:
    """Return a job of num_epochs with its max_steps filled in; one of max_steps as it is."""
    optimization = spec.optimization
    if not optimization.num_epochs:
        return spec
    num_steps = epoch_clock(buckets, spec).steps_for(optimization.num_epochs)
    return replace(spec, optimization=replace(optimization, max_steps=num_steps))


def without_filled_steps(spec: JobSpec) -> JobSpec:
    """Return a job of num_epochs without the max_steps that were filled in: as it was asked for."""
    optimization = spec.optimization
    return replace(spec, optimization=replace(optimization, max_steps=0)) if optimization.num_epochs else spec


def step_range(choice: DatasetChoice) -> StepRange:
    """Return the steps at which a dataset is used."""
    return StepRange(first=max(1, choice.start_step), last=choice.end_step or None)


def steps_per_epoch(buckets: Sequence[Bucket], batch_size: int, gradient_accumulation_steps: int) -> int:
    """Return the optimiser steps in one epoch of every trained dataset; a batch never mixes buckets (spec 6.5)."""
    num_batches = sum(bucket.num_batches(batch_size) for bucket in trained(buckets))
    return math.ceil(num_batches / gradient_accumulation_steps)


def minimum_repeats(num_images: int, effective_batch: int) -> int:
    """Return the extra passes with which `num_images` fill one optimiser step (spec 6.6)."""
    return max(0, math.ceil(effective_batch / num_images) - 1)


def describe_underfilled(buckets: Sequence[Bucket], spec: JobSpec) -> str | None:
    """Return what to tell when a bucket cannot fill one optimiser step, None when all can (spec 6.6)."""
    optimization = spec.optimization
    effective = optimization.effective_batch
    failing = [bucket for bucket in scheduled_buckets(buckets, spec) if bucket.num_samples < effective]
    if not failing:
        return None
    needed = max(minimum_repeats(bucket.num_images, effective) for bucket in failing)
    lines = [
        "Dataset configuration will produce zero usable batches: every bucket needs at least "
        f"{effective} samples (batch_size {optimization.batch_size} x gradient_accumulation_steps "
        f"{optimization.gradient_accumulation_steps}).",
        "dataset | bucket | images | repeats | samples | Minimum repeats required | role | steps",
    ]
    lines += [
        f"{bucket.dataset} | {bucket.width}x{bucket.height} | {bucket.num_images} | {bucket.repeats} | "
        f"{bucket.num_samples} | {minimum_repeats(bucket.num_images, effective)} | {bucket.role} | "
        f"{step_range(spec.datasets[bucket.source])}"
        for bucket in failing
    ]
    lines.append(f"Minimum repeats required: {needed}")
    return "\n".join(lines)


UNDERFILLED_REMEDY = (
    "Raise datasets[].repeats, set allow_dataset_oversubscription, lower optimization.batch_size or "
    "optimization.gradient_accumulation_steps, add images, or set datasets[].crop so that all images share one bucket."
)

EMPTY_REMEDY = (
    "Add images with AddSamples (`reverie dataset add NAME FOLDER`); `reverie dataset scan NAME` says what is wrong "
    "with each image."
)


def describe_empty(dataset: str, num_rejected: int) -> str:
    """Return what to tell when a dataset has no usable image; guides advise on these very words (spec 6.6)."""
    rejected = f"; all {num_rejected} images were rejected" if num_rejected else ""
    return f"no images detected in dataset {dataset!r}{rejected}"
