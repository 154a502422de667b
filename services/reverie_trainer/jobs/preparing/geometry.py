"""Where an image goes: its aspect bucket, its resize and its crop (spec 6.3), as pure functions.

What differs from SimpleTuner on purpose is in docs/decisions/0006: the canvas limit holds for squares too, its size is
that of the checkpoint, squares do not snap to favoured sizes, and a crop is taken from the whole picture, resized,
unless maximum_image_size says from what size on pictures are brought down first.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from reverie_trainer.jobs.spec import CropAspect, DatasetChoice, JobSpec

ALIGNMENT = 64
"""Sides of a bucket are multiples of so many pixels."""

_SMALLEST_ASPECT = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How one dataset's images are brought to size. Sizes are in the unit that `resolution_type` says."""

    resolution: float
    resolution_type: str
    """`pixel_area` (edge of a square of the same area), `area` (megapixels) or `pixel` (shorter edge)."""
    crop: bool = False
    """Whether crops are asked for; otherwise images only lose what their bucket does not hold."""
    crop_style: str = "center"
    """`center`, `corner` or `random`."""
    crop_aspect: str = "square"
    """With crop: `square`, `preserve`, `random` or `closest`."""
    crop_aspect_buckets: tuple[CropAspect, ...] = ()
    minimum_image_size: float = 0.0
    maximum_image_size: float = 0.0
    target_downsample_size: float = 0.0
    minimum_aspect_ratio: float = 0.0
    maximum_aspect_ratio: float = 0.0
    max_upscale_threshold: float = 0.0
    rounding: int = 2
    """Decimals of the aspects that decide which images share a bucket."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """Why an image is not used."""

    message: str
    """The value, the limit and the remedy."""


def geometry_of(choice: DatasetChoice, spec: JobSpec, max_pixels: int) -> Geometry:
    """Return how a dataset's images are brought to size on a canvas of `max_pixels`."""
    return Geometry(
        resolution=choice.resolution,
        resolution_type=choice.resolution_type,
        crop=choice.crop,
        crop_style=choice.crop_style,
        crop_aspect=choice.crop_aspect,
        crop_aspect_buckets=choice.crop_aspect_buckets,
        minimum_image_size=choice.minimum_image_size,
        maximum_image_size=choice.maximum_image_size,
        target_downsample_size=choice.target_downsample_size,
        minimum_aspect_ratio=choice.minimum_aspect_ratio,
        maximum_aspect_ratio=choice.maximum_aspect_ratio,
        max_upscale_threshold=choice.max_upscale_threshold,
        rounding=spec.aspect_bucket_rounding,
        max_pixels=max_pixels,
        seed=spec.seed,
    )


def plan_images(images: Sequence[ImageSize], geometry: Geometry) -> list[ImagePlan | LeftOut]:
    """Return the plan of each image, in order, or why it is left out.

    The first image of an aspect fixes the bucket for that aspect.
    """
    buckets: dict[float, tuple[int, int]] = {}
    plans: list[ImagePlan | LeftOut] = []
    for image in images:
        reason = _reason_to_leave_out(image, geometry)
        if reason is not None:
            plans.append(LeftOut(message=reason))
            continue
        target = target_size(image, geometry)
        key = round(target[0] / target[1], geometry.rounding)
        plan = _cover(image, *buckets.get(key, target), geometry)
        reason = _reason_not_to_enlarge(image, plan, geometry)
        if reason is not None:
            plans.append(LeftOut(message=reason))
            continue
        buckets.setdefault(key, target)
        plans.append(plan)
    return plans


def plan_choice(
    images: Sequence[ImageSize], choice: DatasetChoice, spec: JobSpec, max_pixels: int
) -> list[ImagePlan | LeftOut | None]:
    """Return the plan of each image of a dataset, why it is left out, or None where max_num_samples passes it over."""
    plans: list[ImagePlan | LeftOut | None] = list(plan_images(images, geometry_of(choice, spec, max_pixels)))
    usable = [index for index, plan in enumerate(plans) if isinstance(plan, ImagePlan)]
    if not choice.max_num_samples or len(usable) <= choice.max_num_samples:
        return plans
    usable.sort(key=lambda index: (_fraction(f"{spec.seed}:subset:{images[index].key}"), index))
    for index in usable[choice.max_num_samples :]:
        plans[index] = None
    return plans


def target_size(image: ImageSize, geometry: Geometry) -> tuple[int, int]:
    """Return the bucket (width, height) in pixels of an image (spec 6.3)."""
    # SimpleTuner rounds the aspect before it uses it; the published buckets depend on that.
    aspect = max(round(_wanted_aspect(image, geometry), geometry.rounding), _SMALLEST_ASPECT)
    if geometry.resolution_type == "pixel":
        target = _target_of_shorter_edge(geometry.resolution, _wanted_aspect(image, geometry))
    else:
        target = _target_of_area(_edge(geometry.resolution, geometry.resolution_type), aspect)
    target = _fit_canvas(*target, geometry.max_pixels)
    if round(target[0] / target[1], geometry.rounding) == 1.0:
        edge = align(_edge(geometry.resolution, geometry.resolution_type))
        return _fit_canvas(edge, edge, geometry.max_pixels)
    return target


def align(pixels: float) -> int:
    """Return the nearest multiple of 64, at least 64; exact halves go to the even multiple (spec 6.3)."""
    return max(ALIGNMENT, ALIGNMENT * round(pixels / ALIGNMENT))


def square_edge(resolution: float, resolution_type: str) -> int:
    """Return the edge in pixels of the square that a resolution means, before alignment."""
    return _edge(resolution, resolution_type)


def _wanted_aspect(image: ImageSize, geometry: Geometry) -> float:
    own = image.width / image.height
    if not geometry.crop or geometry.crop_aspect == "preserve":
        return own
    aspects = [bucket.aspect for bucket in geometry.crop_aspect_buckets]
    if geometry.crop_aspect == "closest":
        # By ratio and not by difference: 2:3 is as far from a square as 3:2 is.
        return min(aspects, key=lambda aspect: abs(math.log(aspect / own)))
    if geometry.crop_aspect == "random":
        return _draw_aspect(image.key, geometry)
    return 1.0


def _draw_aspect(key: str, geometry: Geometry) -> float:
    buckets = geometry.crop_aspect_buckets
    weights = [1 / len(buckets) if bucket.weight is None else bucket.weight for bucket in buckets]
    drawn = _fraction(f"{geometry.seed}:aspect:{key}") * sum(weights)
    for bucket, weight in zip(buckets, weights, strict=True):
        drawn -= weight
        if drawn < 0:
            return bucket.aspect
    return buckets[-1].aspect


def _edge(size: float, resolution_type: str) -> int:
    """Whole pixels of the edge of a square of a size; cut off and not rounded, as the published buckets are."""
    # A rounding error of the square root must not cost a pixel: 0.25 megapixels are 500 pixels.
    return int(math.sqrt(size * 1e6) + 1e-9) if resolution_type == "area" else int(size)


def _target_of_area(edge: int, aspect: float) -> tuple[int, int]:
    aligned = align(edge)
    return align(aligned * math.sqrt(aspect)), align(aligned / math.sqrt(aspect))


def _target_of_shorter_edge(resolution: float, aspect: float) -> tuple[int, int]:
    edge = align(resolution)
    if aspect >= 1:
        return align(edge * aspect), edge
    return edge, align(edge / aspect)


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
    scale = max(width / image.width, height / image.height, _scale_before_crop(image, geometry))
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


def _scale_before_crop(image: ImageSize, geometry: Geometry) -> float:
    """Return the least scale of the picture that a crop is cut out of; 0 leaves it to the bucket.

    With maximum_image_size a crop is cut out of the picture as it is, once it is brought down to
    target_downsample_size where it is above the maximum.
    """
    if not geometry.crop or not geometry.maximum_image_size:
        return 0.0
    size = measure(image, geometry.resolution_type)
    if size <= geometry.maximum_image_size:
        return 1.0
    scale = geometry.target_downsample_size / size
    return math.sqrt(scale) if geometry.resolution_type == "area" else scale


def measure(image: ImageSize, resolution_type: str) -> float:
    """Return the size of an image in the unit that a resolution type says."""
    if resolution_type == "pixel":
        return min(image.width, image.height)
    pixels = image.width * image.height
    return pixels / 1e6 if resolution_type == "area" else math.sqrt(pixels)


def _crop_position(key: str, geometry: Geometry) -> tuple[float, float]:
    """Return where the crop lies, as fractions of the free space from the left and from the top."""
    if geometry.crop_style == "corner":
        return 0.0, 0.0
    if geometry.crop_style == "center":
        return 0.5, 0.5
    digest = hashlib.sha256(f"{geometry.seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64, int.from_bytes(digest[8:16], "big") / 2**64


def _fraction(text: str) -> float:
    """Return a number in [0, 1) that depends on a text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _reason_to_leave_out(image: ImageSize, geometry: Geometry) -> str | None:
    shape = f"{image.width}x{image.height}"
    # Exactly: a picture of 1024x1024 is not below 1024, whatever its square root is in floating point.
    if geometry.minimum_image_size and _is_below(image, geometry.minimum_image_size, geometry.resolution_type):
        size = measure(image, geometry.resolution_type)
        return (
            f"{shape} is {size:.4g} as {geometry.resolution_type}, below minimum_image_size "
            f"{geometry.minimum_image_size:g}; use a larger picture or lower minimum_image_size"
        )
    aspect = image.width / image.height
    if geometry.minimum_aspect_ratio and aspect < geometry.minimum_aspect_ratio:
        return (
            f"{shape} has the aspect {aspect:.4g}, below minimum_aspect_ratio {geometry.minimum_aspect_ratio:g}; crop "
            "it or lower minimum_aspect_ratio"
        )
    if geometry.maximum_aspect_ratio and aspect > geometry.maximum_aspect_ratio:
        return (
            f"{shape} has the aspect {aspect:.4g}, above maximum_aspect_ratio {geometry.maximum_aspect_ratio:g}; crop "
            "it or raise maximum_aspect_ratio"
        )
    return None


def _is_below(image: ImageSize, size: float, resolution_type: str) -> bool:
    if resolution_type == "pixel":
        return min(image.width, image.height) < size
    pixels = size * 1e6 if resolution_type == "area" else size * size
    return image.width * image.height < pixels


def _reason_not_to_enlarge(image: ImageSize, plan: ImagePlan, geometry: Geometry) -> str | None:
    factor = plan.resize_width * plan.resize_height / (image.width * image.height)
    if not geometry.max_upscale_threshold or factor <= geometry.max_upscale_threshold:
        return None
    return (
        f"{image.width}x{image.height} would be enlarged to {plan.resize_width}x{plan.resize_height}, {factor:.3g} "
        f"times its area, above max_upscale_threshold {geometry.max_upscale_threshold:g}; use a larger picture, lower "
        "resolution or raise max_upscale_threshold"
    )
