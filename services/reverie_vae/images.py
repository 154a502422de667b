"""Reading image files: refuse what cannot be trained on, by name and reason; turn the rest into RGB pixels.

The order is that of a person looking at the picture: EXIF rotation first, then resize, then crop. 8-bit RGB and grey
JPEG files take the fast path (simplejpeg and torch); everything else goes through Pillow. Embedded colour profiles are
ignored. The store, caching and the VAE are elsewhere.
"""

import io
import logging
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError

from reverie_vae.limits import DEFAULT_MAX_PIXELS, MAX_FILE_BYTES
from reverie_vae.rejections import ImageRejectedError, Reason
from reverie_vae.resize import resize_lanczos

logger = logging.getLogger(__name__)

TRANSFORM_VERSION = 2
"""Part of every latent's key. Raise it when any pixel that `read_pixels` returns changes."""

INSPECTION_VERSION = 1
"""Part of every inspection's key. Raise it when the answer for any file changes."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_READABLE = "JPEG, PNG, WebP, BMP, TIFF or single-frame GIF"
_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
}
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_ORIENTATION_TAG = 0x0112
_FIRST_TURNED = 5
"""From this EXIF orientation on, width and height change places."""
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow raises on damaged files, by experience and by its own ImageFile.load.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, KeyError, TypeError, OverflowError)

# The pixel limit is ours, an argument, and checked on the header; Pillow's global one would only warn or refuse first.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageDescription:
    """What a usable image file holds."""

    width: int
    """Pixels, after the EXIF rotation."""
    height: int
    """Pixels, after the EXIF rotation."""
    format: str
    """`JPEG`, `PNG`, ... as Pillow names it; phones' multi-picture JPEG files are `JPEG`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResizeCrop:
    """How to bring one image to its bucket. Numbers are pixels of the image after the EXIF rotation."""

    resize_width: int
    resize_height: int
    crop_left: int
    crop_top: int
    width: int
    height: int


def inspect_image(body: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> ImageDescription:
    """Open and decode a whole file; raise ImageRejectedError if it cannot be used."""
    with _opened(body, max_pixels) as image:
        format_name = _format_of(image)
        height, width = _decode(image, body).shape[1:]
    return ImageDescription(width=width, height=height, format=format_name)


def read_size(body: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """Return (width, height) in pixels after the EXIF rotation, from the header; raise ImageRejectedError as others."""
    with _opened(body, max_pixels) as image:
        is_turned = _orientation(image) >= _FIRST_TURNED
        return (image.height, image.width) if is_turned else (image.width, image.height)


def read_pixels(body: bytes, plan: ResizeCrop, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> torch.Tensor:
    """Decode, rotate, resize and crop an image file.

    Args:
        body: The whole file.
        plan: Target geometry; the crop lies inside the resized image.
        max_pixels: Images over this many pixels are rejected before they are decoded.

    Returns:
        (3, plan.height, plan.width) uint8 RGB, contiguous. Within 1 LSB of `read_pixels_with_pillow`.

    Raises:
        ImageRejectedError: The file cannot be used.
    """
    with _opened(body, max_pixels) as image:
        if not _is_plain_jpeg(image):
            return _resize_with_pillow(_decode_with_pillow(image, body), plan)
        pixels = _decode_jpeg(image, body)
    resized = resize_lanczos(pixels, width=plan.resize_width, height=plan.resize_height)
    bottom, right = plan.crop_top + plan.height, plan.crop_left + plan.width
    cropped = resized[:, plan.crop_top : bottom, plan.crop_left : right]
    return cropped.expand(3, -1, -1).contiguous()


def read_pixels_with_pillow(body: bytes, plan: ResizeCrop, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> torch.Tensor:
    """Do what `read_pixels` does by Pillow alone: the reference for its values and for its rate."""
    with _opened(body, max_pixels) as image:
        return _resize_with_pillow(_decode_with_pillow(image, body, strict=False), plan)


@contextmanager
def _opened(body: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Open a file's header and refuse what the header is enough to refuse."""
    if not body:
        raise ImageRejectedError(Reason.EMPTY, "the file has 0 bytes; upload it again")
    refuse_large_file(len(body))
    image = _open_header(body)
    with image:
        refuse_many_pixels(image.width, image.height, max_pixels)
        _refuse_animation(image)
        yield image


def refuse_large_file(size_bytes: int) -> None:
    """Raise ImageRejectedError if a file of this size is over MAX_FILE_BYTES."""
    if size_bytes > MAX_FILE_BYTES:
        raise ImageRejectedError(
            Reason.TOO_MANY_BYTES,
            f"the file has {size_bytes} bytes, the limit is {MAX_FILE_BYTES}; save it in a compressed format",
        )


def _open_header(body: bytes) -> Image.Image:
    try:
        with _silent_warnings():
            return Image.open(io.BytesIO(body), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise _unidentified(body) from error
    except _DAMAGE as error:
        raise _corrupt(error) from error


_warnings_lock = threading.Lock()


@contextmanager
def _silent_warnings() -> Iterator[None]:
    """Keep Pillow's remarks on odd metadata to itself. `catch_warnings` alone is not safe between threads."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _unidentified(body: bytes) -> ImageRejectedError:
    name = _signature(body)
    if name is not None:
        message = f"starts like a {name} file but its header cannot be read; export or upload it again"
        return ImageRejectedError(Reason.CORRUPT, message)
    hint = " (it looks like HEIC or AVIF)" if body[4:8] == b"ftyp" else ""
    return ImageRejectedError(Reason.NOT_AN_IMAGE, f"not an image{hint}; convert it to {_READABLE}, or remove it")


def _signature(body: bytes) -> str | None:
    if body[:4] == b"RIFF" and body[8:12] == b"WEBP":
        return "WebP"
    return next((name for start, name in _SIGNATURES.items() if body.startswith(start)), None)


def _corrupt(error: Exception) -> ImageRejectedError:
    detail = str(error) or type(error).__name__
    return ImageRejectedError(
        Reason.CORRUPT, f"the file ends early or its data are damaged ({detail}); upload it again"
    )


def refuse_many_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise ImageRejectedError if an image of this size is over the limit."""
    if width * height > max_pixels:
        raise ImageRejectedError(
            Reason.TOO_MANY_PIXELS,
            f"{width}x{height} = {width * height} pixels, the limit is {max_pixels}; make it smaller,"
            " or raise max_pixels of the VAE service",
        )


def _refuse_animation(image: Image.Image) -> None:
    # A phone's multi-picture JPEG holds depth maps or a second view behind the photograph: the photograph is meant.
    if image.format == "MPO":
        return
    try:
        with _silent_warnings():
            num_frames = getattr(image, "n_frames", 1)
    except _DAMAGE as error:
        raise _corrupt(error) from error
    if num_frames > 1:
        message = f"{image.format} with {num_frames} frames; export one frame as a still image"
        raise ImageRejectedError(Reason.ANIMATED, message)


def _format_of(image: Image.Image) -> str:
    return "JPEG" if image.format == "MPO" else str(image.format)


def _is_plain_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")


def _decode(image: Image.Image, body: bytes) -> torch.Tensor:
    """Decode to (C, H, W) uint8, C = 1 for grey JPEG files and 3 otherwise."""
    if _is_plain_jpeg(image):
        return _decode_jpeg(image, body)
    return torch.from_numpy(np.array(_decode_with_pillow(image, body))).permute(2, 0, 1)


def _decode_jpeg(image: Image.Image, body: bytes) -> torch.Tensor:
    """Decode an 8-bit RGB or grey JPEG file to (C, H, W) uint8; bit-identical to Pillow's decoder."""
    try:
        pixels = simplejpeg.decode_jpeg(body, "GRAY" if image.mode == "L" else "RGB", strict=True)
    except ValueError as error:
        # TurboJPEG knows six subsampling layouts; libjpeg, inside Pillow, reads the rare others too.
        if "subsampling" not in str(error):
            raise _corrupt(error) from error
        return _pillow_jpeg(image)
    return _rotate(torch.from_numpy(pixels), _orientation(image)).permute(2, 0, 1)


def _pillow_jpeg(image: Image.Image) -> torch.Tensor:
    try:
        pixels = np.atleast_3d(np.array(image))
    except _DAMAGE as error:
        raise _corrupt(error) from error
    return _rotate(torch.from_numpy(pixels), _orientation(image)).permute(2, 0, 1)


def _orientation(image: Image.Image) -> int:
    """Read the EXIF orientation, 1 to 8; unreadable EXIF says nothing about the pixels and counts as 1."""
    try:
        with _silent_warnings():
            orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DAMAGE as error:
        logger.debug("unreadable EXIF data: %s", error)
        return 1
    return orientation if orientation in range(1, 9) else 1


def _rotate(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Undo an EXIF orientation of (H, W, C) pixels as ImageOps.exif_transpose does."""
    if orientation >= _FIRST_TURNED:
        pixels = pixels.transpose(0, 1)
    flips = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}.get(orientation, ())
    return pixels.flip(flips) if flips else pixels


def _decode_with_pillow(image: Image.Image, body: bytes, *, strict: bool = True) -> Image.Image:
    """Decode, rotate, and bring any mode to RGB over white. `strict` finds damage that Pillow itself lets pass."""
    try:
        if strict:
            _find_silent_damage(image, body)
        # A TIFF file's tags are read again here, with warnings; the lock that silences them costs the rare format only.
        with _silent_warnings() if image.format == "TIFF" else nullcontext():
            image.load()
    except _DAMAGE as error:
        raise _corrupt(error) from error
    return _to_rgb(_transposed(image))


def _find_silent_damage(image: Image.Image, body: bytes) -> None:
    if image.format in ("JPEG", "MPO"):
        # Raises ValueError on libjpeg's warnings, which Pillow drops.
        simplejpeg.decode_jpeg(body, "CMYK", strict=True)
    elif image.format == "PNG":
        if _PNG_END not in body:
            raise ValueError("truncated PNG file")
        with Image.open(io.BytesIO(body), formats=("PNG",)) as copy:
            copy.verify()  # every chunk's checksum; Pillow's load skips those of the pixels


def _transposed(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it also rewrites the EXIF block, and fails on blocks that it cannot write.
    method = _TRANSPOSITIONS.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = _scale_to_8_bits(image)
    if image.mode in ("I", "F", "LAB", "HSV"):
        message = f"{image.format or 'image'} of mode {image.mode} has no defined 8-bit RGB; save it as 8 or 16 bit RGB"
        raise ImageRejectedError(Reason.NOT_AN_IMAGE, message)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Map 0..65535 to 0..255 by value; Pillow's own conversion clips at 255."""
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _resize_with_pillow(image: Image.Image, plan: ResizeCrop) -> torch.Tensor:
    size = (plan.resize_width, plan.resize_height)
    resized = image.resize(size, Image.Resampling.LANCZOS) if image.size != size else image
    box = (plan.crop_left, plan.crop_top, plan.crop_left + plan.width, plan.crop_top + plan.height)
    return torch.from_numpy(np.array(resized.crop(box))).permute(2, 0, 1).contiguous()
