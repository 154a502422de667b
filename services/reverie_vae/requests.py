"""What a request of the VAE service must look like: everything that is wrong with one is found at once."""

import re
from collections.abc import Callable, Iterator, Sequence

from reverie.common.v1.common_pb2 import ObjectRef, TensorRef
from reverie.vae.v1 import vae_pb2
from reverie_common.errors import FieldViolation, InvalidArgumentError

from reverie_vae.engine import VaeFacts
from reverie_vae.files import ImageFile
from reverie_vae.images import ResizeCrop

KeyOf = Callable[[str], str]
"""Key of a URI in this service's store; raises InvalidArgumentError for another store's."""

Locate = Callable[[str], tuple[str, str]]
"""(bucket, key) of a URI; raises InvalidArgumentError for a bucket that may not be read."""

MAX_IMAGES = 1024
BUCKET_STEP = 64
MAX_BUCKET_PIXELS = 4 * 1024 * 1024
"""Of a bucket: four times HiDream's canvas."""
MAX_RESIZED_PIXELS = 100_000_000
MAX_LATENTS = 16

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LATENT_DTYPES = ("F32", "BF16", "F16")


def checked_images(request: vae_pb2.InspectImagesRequest, locate: Locate) -> list[ImageFile]:
    """The files of a request.

    Raises:
        InvalidArgumentError: with every wrong field.
    """
    violations = [*_count_violations(len(request.images))]
    for index, ref in enumerate(request.images):
        violations += _object_violations(f"images[{index}]", ref, locate)
    _refuse(violations)
    return [_file(ref, locate) for ref in request.images]


def checked_plans(
    plans: Sequence[vae_pb2.ImagePlan], locate: Locate, *, field: str = "images", downsampling: int
) -> list[tuple[ImageFile, ResizeCrop]]:
    """The files and plans of a request; `field` is its list of them.

    Raises:
        InvalidArgumentError: with every wrong field.
    """
    violations = [*_count_violations(len(plans), field)]
    for index, plan in enumerate(plans):
        violations += _object_violations(f"{field}[{index}].image", plan.image, locate)
        violations += _plan_violations(f"{field}[{index}]", plan, step=max(BUCKET_STEP, downsampling))
    _refuse(violations)
    return [(_file(plan.image, locate), _resize_crop(plan)) for plan in plans]


def check_latents(ref: TensorRef, key_of: KeyOf, facts: VaeFacts) -> None:
    """Check a reference to latents.

    Raises:
        InvalidArgumentError: with every wrong field.
    """
    violations = [*_reference_violations("latents", ref.uri, ref.sha256, key_of)]
    if ref.dtype not in _LATENT_DTYPES:
        description = f"{ref.dtype!r} is not one of {', '.join(_LATENT_DTYPES)}"
        violations.append(FieldViolation(field="latents.dtype", description=description))
    violations += _latent_shape_violations(tuple(ref.shape), facts)
    _refuse(violations)


def _refuse(violations: Sequence[FieldViolation]) -> None:
    if violations:
        first = violations[0]
        message = f"{len(violations)} fields of the request are wrong, the first is {first.field}: {first.description}"
        raise InvalidArgumentError(message, violations=violations)


def _count_violations(num_images: int, field: str = "images") -> Iterator[FieldViolation]:
    if not 1 <= num_images <= MAX_IMAGES:
        description = f"{num_images} {field}, must be 1 to {MAX_IMAGES}; split the request"
        yield FieldViolation(field=field, description=description)


def _object_violations(field: str, ref: ObjectRef, locate: Locate) -> Iterator[FieldViolation]:
    return _reference_violations(field, ref.uri, ref.sha256, locate)


def _reference_violations(field: str, uri: str, sha256: str, find: KeyOf | Locate) -> Iterator[FieldViolation]:
    try:
        find(uri)
    except InvalidArgumentError as error:
        yield FieldViolation(field=f"{field}.uri", description=error.message)
    if not _SHA256.fullmatch(sha256):
        description = f"{sha256[:80]!r} is not a lower-case hex sha256 of 64 characters"
        yield FieldViolation(field=f"{field}.sha256", description=description)


def _plan_violations(field: str, plan: vae_pb2.ImagePlan, *, step: int) -> Iterator[FieldViolation]:
    for name in ("width", "height"):
        value = getattr(plan, name)
        if value < step or value % step:
            description = f"{value} is not a multiple of {step} pixels, at least {step}"
            yield FieldViolation(field=f"{field}.{name}", description=description)
    if plan.width * plan.height > MAX_BUCKET_PIXELS:
        description = f"{plan.width}x{plan.height} is over {MAX_BUCKET_PIXELS} pixels; choose a smaller bucket"
        yield FieldViolation(field=f"{field}.width", description=description)
    if plan.resize_width * plan.resize_height > MAX_RESIZED_PIXELS:
        description = f"{plan.resize_width}x{plan.resize_height} is over {MAX_RESIZED_PIXELS} pixels; resize to less"
        yield FieldViolation(field=f"{field}.resize_width", description=description)
    for edge, size in (("left", "width"), ("top", "height")):
        end, limit = getattr(plan, f"crop_{edge}") + getattr(plan, size), getattr(plan, f"resize_{size}")
        if end > limit:
            description = f"the crop ends at {end}, outside of resize_{size} {limit}"
            yield FieldViolation(field=f"{field}.crop_{edge}", description=description)


def _latent_shape_violations(shape: tuple[int, ...], facts: VaeFacts) -> Iterator[FieldViolation]:
    channels, scale = facts.latent_channels, facts.downsampling
    if len(shape) != 4 or shape[1] != channels or not 1 <= shape[0] <= MAX_LATENTS or 0 in shape:
        description = (
            f"{list(shape)} is not [N, {channels}, height/{scale}, width/{scale}] with N from 1 to {MAX_LATENTS}"
        )
        yield FieldViolation(field="latents.shape", description=description)
    elif shape[2] * shape[3] * scale * scale > MAX_BUCKET_PIXELS:
        description = f"{shape[3] * scale}x{shape[2] * scale} is over {MAX_BUCKET_PIXELS} pixels"
        yield FieldViolation(field="latents.shape", description=description)


def _file(ref: ObjectRef, locate: Locate) -> ImageFile:
    bucket, key = locate(ref.uri)
    return ImageFile(bucket=bucket, key=key, sha256=ref.sha256, size_bytes=ref.size_bytes)


def _resize_crop(plan: vae_pb2.ImagePlan) -> ResizeCrop:
    return ResizeCrop(
        resize_width=plan.resize_width,
        resize_height=plan.resize_height,
        crop_left=plan.crop_left,
        crop_top=plan.crop_top,
        width=plan.width,
        height=plan.height,
    )
