"""A folder of pictures and captions on this machine: read and checked, every problem at once.

Where captions come from is in captions.py. Not here: whether a picture can be decoded (the services say, because only
they hold an image library).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from reverie_common.errors import FieldViolation, InvalidArgumentError

from reverie_client.captions import CaptionSource, TextFiles, violation
from reverie_client.transfer import sha256_of

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
MAX_IMAGE_BYTES = 256 << 20
MAX_NAME_CHARACTERS = 255


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalMask:
    """A mask on this machine."""

    path: Path
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalSample:
    """One picture on this machine with its captions."""

    name: str
    """Path relative to its folder, with forward slashes."""
    path: Path
    captions: tuple[str, ...]
    size_bytes: int
    sha256: str
    mask: LocalMask | None = None
    """Which parts of the picture count; None is all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalFolder:
    """What a folder holds."""

    samples: tuple[LocalSample, ...]
    ignored: tuple[Path, ...]
    """Files that are neither a picture nor the captions or the mask of one."""


def read_folders(
    folders: Sequence[Path],
    *,
    needs_captions: bool = True,
    captions: CaptionSource | None = None,
    masks: Path | None = None,
) -> LocalFolder:
    """Read pictures and captions from folders, sub-folders included.

    Args:
        folders: where to look; hidden files and folders are passed over.
        needs_captions: False where the job gives an instance_prompt.
        captions: where captions come from; text files beside the pictures by default.
        masks: folder of masks, each with the path and stem of its picture.

    Raises:
        InvalidArgumentError: with one violation for each thing that is wrong, in every folder.
    """
    source = TextFiles() if captions is None else captions
    violations: list[FieldViolation] = []
    samples: list[LocalSample] = []
    ignored: list[Path] = []
    for folder in folders:
        files = _files(folder, violations)
        pictures = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        texts = {picture.with_suffix(".txt") for picture in pictures} if isinstance(source, TextFiles) else set()
        known = {*pictures, *texts}
        ignored += [file for file in files if file not in known and not _is_table(source, file)]
        if files is not NOTHING and not pictures:
            violations.append(violation(folder, _no_pictures(files)))
        found = _masks(masks, folder, pictures, violations)
        for picture in pictures:
            texts_of_picture = _captions(folder, picture, source, needs_captions, violations)
            sample = _sample(folder, picture, texts_of_picture, found.get(picture), violations)
            if sample is not None:
                samples.append(sample)
    violations += _duplicates(samples)
    if violations:
        raise InvalidArgumentError(
            f"{len(violations)} {'problem' if len(violations) == 1 else 'problems'} in "
            f"{', '.join(str(folder) for folder in folders)}; nothing was uploaded",
            reason="INVALID_FOLDER",
            violations=violations,
        )
    if masks is not None:
        used = {sample.mask.path for sample in samples if sample.mask is not None}
        ignored += [file for file in sorted(_walk(masks)) if file not in used]
    return LocalFolder(samples=tuple(samples), ignored=tuple(ignored))


NOTHING: tuple[Path, ...] = ()


def _is_table(source: CaptionSource, file: Path) -> bool:
    return not isinstance(source, TextFiles) and source.owns(file)


def _files(folder: Path, violations: list[FieldViolation]) -> Sequence[Path]:
    """List the visible files below a folder, by name; a folder that cannot be read is a violation."""
    if not folder.exists():
        violations.append(violation(folder, "this folder does not exist; check the path"))
        return NOTHING
    if not folder.is_dir():
        violations.append(violation(folder, "this is a file; give the folder that holds it"))
        return NOTHING
    try:
        return sorted(_walk(folder))
    except OSError as error:
        violations.append(violation(folder, f"this folder cannot be read: {error.strerror}"))
        return NOTHING


def _walk(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.name.startswith((".", "__MACOSX")):
            continue
        if entry.is_dir():
            yield from _walk(entry)
        else:
            yield entry


def _no_pictures(others: Sequence[Path]) -> str:
    kinds = ", ".join(sorted(IMAGE_SUFFIXES))
    found = f"it holds {len(others)} other files" if others else "it is empty"
    return f"no images detected in dataset: {found}; put pictures there ({kinds})"


def _sample(
    folder: Path,
    picture: Path,
    captions: tuple[str, ...],
    mask: LocalMask | None,
    violations: list[FieldViolation],
) -> LocalSample | None:
    name = picture.relative_to(folder).as_posix()
    try:
        name.encode("utf-8")
        size_bytes = picture.stat().st_size
        digest = sha256_of(picture)
    except OSError as error:
        violations.append(violation(picture, f"this file cannot be read: {error.strerror}"))
        return None
    except UnicodeEncodeError:
        violations.append(violation(ascii(str(picture)), "this file name is not UTF-8; rename the file"))
        return None
    if size_bytes > MAX_IMAGE_BYTES:
        violations.append(
            violation(
                str(picture),
                f"{size_bytes} bytes are above the limit of {MAX_IMAGE_BYTES}; make it smaller",
            )
        )
    if len(name) > MAX_NAME_CHARACTERS:
        limit = f"{len(name)} characters of name are above the limit of {MAX_NAME_CHARACTERS}; rename it"
        violations.append(violation(picture, limit))
    return LocalSample(name=name, path=picture, captions=captions, size_bytes=size_bytes, sha256=digest, mask=mask)


def _captions(
    folder: Path, picture: Path, source: CaptionSource, is_needed: bool, violations: list[FieldViolation]
) -> tuple[str, ...]:
    """Read the captions of one picture; what is wrong with them is a violation."""
    num_before = len(violations)
    captions = source.captions_of(folder, picture, violations)
    if not captions and is_needed and len(violations) == num_before:
        path = picture.with_suffix(".txt")
        at = path if isinstance(source, TextFiles) and path.exists() else picture
        violations.append(violation(at, source.missing(picture)))
    return captions


def _masks(
    masks: Path | None, folder: Path, pictures: Sequence[Path], violations: list[FieldViolation]
) -> dict[Path, LocalMask]:
    """Find the mask of each picture: the picture of the same path or stem below the folder of masks."""
    if masks is None:
        return {}
    files = [file for file in _files(masks, violations) if file.suffix.lower() in IMAGE_SUFFIXES]
    by_stem = {file.relative_to(masks).with_suffix("").as_posix(): file for file in files}
    found = {}
    for picture in pictures:
        file = by_stem.get(picture.relative_to(folder).with_suffix("").as_posix())
        if file is not None:
            found[picture] = LocalMask(path=file, size_bytes=file.stat().st_size, sha256=sha256_of(file))
    if pictures and not found:
        example = pictures[0].with_suffix(".png").name
        violations.append(
            violation(masks, f"no mask has the name of a picture; name the mask of {pictures[0].name} {example}")
        )
    return found


def _duplicates(samples: Sequence[LocalSample]) -> Iterator[FieldViolation]:
    seen: dict[str, Path] = {}
    for sample in samples:
        first = seen.setdefault(sample.name, sample.path)
        if first != sample.path:
            yield violation(
                str(sample.path),
                f"the name {sample.name} is also that of {first}; names are unique in a dataset: rename one",
            )
