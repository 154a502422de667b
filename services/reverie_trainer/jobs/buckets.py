"""Where an image goes: its aspect bucket, its resize and its crop (spec 6.3), as pure functions.

Three things differ from SimpleTuner on purpose: the canvas limit holds for squares too, its size is that of the
checkpoint, and `crop: true` resizes to cover the square before it crops (SimpleTuner cuts the square out of the
full-resolution photograph, so that a large photograph shows only a detail).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64
"""Sides of a bucket are multiples of so many pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How one dataset's images are brought to size."""

    resolution: int
    """Pixels, in the unit that `resolution_type` says."""
    resolution_type: str
    """`pixel_area` or `pixel`."""
    crop: bool
    """Whether every image becomes a square."""
    crop_style: str
    """`center`, `corner` or `random`."""
    max_pixels: int
    """The checkpoint's canvas in pixels; no bucket is larger."""
    seed: int
    """Seed of random crops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePlan:
    """The way of one image into its bucket: resize, then crop; all in pixels."""

    resize_width: int
    resize_height: int
    crop_left: int
    crop_top: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSize:
    """An image as it will be shown, after its EXIF rotation."""

    key: str
    """What identifies the image's content; random crops depend on it."""
    width: int
    height: int


def plan_images(images: Sequence[ImageSize], geometry: Geometry) -> list[ImagePlan]:
    """Return the plan of each image, in order; the first image of an aspect fixes the bucket for that aspect."""
    buckets: dict[float, tuple[int, int]] = {}
    plans = []
    for image in images:
        target = target_size(image.width, image.height, geometry)
        width, height = buckets.setdefault(round(target[0] / target[1], 2), target)
        plans.append(_cover(image, width, height, geometry))
    return plans


def target_size(width: int, height: int, geometry: Geometry) -> tuple[int, int]:
    """Return the bucket (width, height) in pixels for an image of the given size (spec 6.3)."""
    if geometry.crop:
        return _square(geometry)
    # SimpleTuner rounds the aspect before it uses it; the published buckets depend on that.
    aspect = round(width / height, 2)
    if geometry.resolution_type == "pixel":
        target = _target_of_shorter_edge(geometry.resolution, width / height)
    else:
        target = _target_of_area(geometry.resolution, max(aspect, 0.01))
    target = _fit_canvas(*target, geometry.max_pixels)
    if round(target[0] / target[1], 2) == 1.0:
        return _square(geometry)
    return target


def align(pixels: float) -> int:
    """Return the nearest multiple of 64, at least 64; exact halves go to the even multiple (spec 6.3)."""
    return max(ALIGNMENT, ALIGNMENT * round(pixels / ALIGNMENT))


def _target_of_area(resolution: int, aspect: float) -> tuple[int, int]:
    megapixels = resolution**2 / 1e6
    edge = align(int(math.sqrt(megapixels * 1e6)))
    return align(edge * math.sqrt(aspect)), align(edge / math.sqrt(aspect))


def _target_of_shorter_edge(resolution: int, aspect: float) -> tuple[int, int]:
    edge = align(resolution)
    if aspect >= 1:
        return align(edge * aspect), edge
    return edge, align(edge / aspect)


def _square(geometry: Geometry) -> tuple[int, int]:
    edge = align(geometry.resolution)
    return _fit_canvas(edge, edge, geometry.max_pixels)


def _fit_canvas(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    if width * height <= max_pixels:
        return width, height
    scale = math.sqrt(max_pixels / (width * height))
    width, height = align(int(width * scale)), align(int(height * scale))
    shorten_width = width >= height
    while width * height > max_pixels:
        if (shorten_width and width > ALIGNMENT) or height == ALIGNMENT:
            width -= ALIGNMENT
        else:
            height -= ALIGNMENT
        shorten_width = not shorten_width
    return width, height


def _cover(image: ImageSize, width: int, height: int, geometry: Geometry) -> ImagePlan:
    """Resize so that the image covers the bucket with its own aspect, then crop."""
    scale = max(width / image.width, height / image.height)
    resize_width = max(width, round(image.width * scale))
    resize_height = max(height, round(image.height * scale))
    across, down = _crop_position(image.key, geometry)
    return ImagePlan(
        resize_width=resize_width,
        resize_height=resize_height,
        crop_left=int((resize_width - width) * across),
        crop_top=int((resize_height - height) * down),
        width=width,
        height=height,
    )


def _crop_position(key: str, geometry: Geometry) -> tuple[float, float]:
    """Return where the crop lies, as fractions of the free space from the left and from the top."""
    if geometry.crop_style == "corner":
        return 0.0, 0.0
    if geometry.crop_style == "center":
        return 0.5, 0.5
    digest = hashlib.sha256(f"{geometry.seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64, int.from_bytes(digest[8:16], "big") / 2**64


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """How many of a dataset's images share one size."""

    dataset: str
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


def count_buckets(dataset: str, repeats: int, sizes: Sequence[tuple[int, int]]) -> list[Bucket]:
    """Count images by (width, height), largest count first, then by size."""
    counts: dict[tuple[int, int], int] = {}
    for size in sizes:
        counts[size] = counts.get(size, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [
        Bucket(dataset=dataset, repeats=repeats, width=width, height=height, num_images=count)
        for (width, height), count in ordered
    ]


def steps_per_epoch(buckets: Sequence[Bucket], batch_size: int, gradient_accumulation_steps: int) -> int:
    """Return the optimiser steps in one epoch; a batch never mixes buckets (spec 6.5)."""
    return math.ceil(sum(bucket.num_batches(batch_size) for bucket in buckets) / gradient_accumulation_steps)


def minimum_repeats(num_images: int, effective_batch: int) -> int:
    """Return the extra passes with which `num_images` fill one optimiser step (spec 6.6)."""
    return max(0, math.ceil(effective_batch / num_images) - 1)


def describe_underfilled(buckets: Sequence[Bucket], batch_size: int, gradient_accumulation_steps: int) -> str | None:
    """Return what to tell when a bucket cannot fill one optimiser step, None when all can (spec 6.6)."""
    effective = batch_size * gradient_accumulation_steps
    failing = [bucket for bucket in buckets if bucket.num_samples < effective]
    if not failing:
        return None
    needed = max(minimum_repeats(bucket.num_images, effective) for bucket in failing)
    lines = [
        "Dataset configuration will produce zero usable batches: every bucket needs at least "
        f"{effective} samples (batch_size {batch_size} x gradient_accumulation_steps {gradient_accumulation_steps}).",
        "dataset | bucket | images | repeats | samples | Minimum repeats required",
    ]
    lines += [
        f"{bucket.dataset} | {bucket.width}x{bucket.height} | {bucket.num_images} | {bucket.repeats} | "
        f"{bucket.num_samples} | {minimum_repeats(bucket.num_images, effective)}"
        for bucket in failing
    ]
    lines.append(f"Minimum repeats required: {needed}")
    return "\n".join(lines)


UNDERFILLED_REMEDY = (
    "Raise datasets[].repeats, lower optimization.batch_size or optimization.gradient_accumulation_steps, add images, "
    "or set datasets[].crop so that all images share one bucket."
)

EMPTY_REMEDY = (
    "Add images with AddSamples (`reverie dataset add NAME FOLDER`); `reverie dataset scan NAME` says what is wrong "
    "with each image."
)


def describe_empty(dataset: str, num_rejected: int) -> str:
    """Return what to tell when a dataset has no usable image; guides advise on these very words (spec 6.6)."""
    rejected = f"; all {num_rejected} images were rejected" if num_rejected else ""
    return f"no images detected in dataset {dataset!r}{rejected}"
