"""A folder of pictures and captions on this machine: read and checked, every problem at once.

`<picture>.txt` beside a picture holds its captions, one on each line. Not here: whether a picture can be decoded (the
services say, because only they hold an image library).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from reverie_common.errors import FieldViolation, InvalidArgumentError

from reverie_client.transfer import sha256_of

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
MAX_CAPTION_CHARACTERS = 8192
MAX_IMAGE_BYTES = 256 << 20
MAX_NAME_CHARACTERS = 255


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalSample:
    """One picture on this machine with its captions."""

    name: str
    """Path relative to its folder, with forward slashes."""
    path: Path
    captions: tuple[str, ...]
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalFolder:
    """What a folder holds."""

    samples: tuple[LocalSample, ...]
    ignored: tuple[Path, ...]
    """Files that are neither a picture nor the captions of one."""


def read_folders(folders: Sequence[Path], *, needs_captions: bool = True) -> LocalFolder:
    """Read pictures and captions from folders, sub-folders included.

    Args:
        folders: where to look; hidden files and folders are passed over.
        needs_captions: False where the job gives an instance_prompt.

    Raises:
        InvalidArgumentError: with one violation for each thing that is wrong, in every folder.
    """
    violations: list[FieldViolation] = []
    samples: list[LocalSample] = []
    ignored: list[Path] = []
    for folder in folders:
        files = _files(folder, violations)
        pictures = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        captions = {picture.with_suffix(".txt") for picture in pictures}
        ignored += [file for file in files if file not in captions and file not in set(pictures)]
        if files is not NOTHING and not pictures:
            violations.append(_violation(folder, _no_pictures(files)))
        samples += _samples(folder, pictures, needs_captions, violations)
    violations += _duplicates(samples)
    if violations:
        raise InvalidArgumentError(
            f"{len(violations)} {'problem' if len(violations) == 1 else 'problems'} in "
            f"{', '.join(str(folder) for folder in folders)}; nothing was uploaded",
            reason="INVALID_FOLDER",
            violations=violations,
        )
    return LocalFolder(samples=tuple(samples), ignored=tuple(ignored))


NOTHING: tuple[Path, ...] = ()


def _violation(path: Path | str, description: str) -> FieldViolation:
    return FieldViolation(field=str(path), description=description)


def _files(folder: Path, violations: list[FieldViolation]) -> Sequence[Path]:
    """List the visible files below a folder, by name; a folder that cannot be read is a violation."""
    if not folder.exists():
        violations.append(_violation(folder, "this folder does not exist; check the path"))
        return NOTHING
    if not folder.is_dir():
        violations.append(_violation(folder, "this is a file; give the folder that holds it"))
        return NOTHING
    try:
        return sorted(_walk(folder))
    except OSError as error:
        violations.append(_violation(folder, f"this folder cannot be read: {error.strerror}"))
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


def _samples(
    folder: Path, pictures: Sequence[Path], needs_captions: bool, violations: list[FieldViolation]
) -> Iterator[LocalSample]:
    for picture in pictures:
        captions = _captions(picture, needs_captions, violations)
        sample = _sample(folder, picture, captions, violations)
        if sample is not None:
            yield sample


def _sample(
    folder: Path, picture: Path, captions: tuple[str, ...], violations: list[FieldViolation]
) -> LocalSample | None:
    name = picture.relative_to(folder).as_posix()
    try:
        name.encode("utf-8")
        size_bytes = picture.stat().st_size
        digest = sha256_of(picture)
    except OSError as error:
        violations.append(_violation(picture, f"this file cannot be read: {error.strerror}"))
        return None
    except UnicodeEncodeError:
        violations.append(_violation(ascii(str(picture)), "this file name is not UTF-8; rename the file"))
        return None
    if size_bytes > MAX_IMAGE_BYTES:
        violations.append(
            _violation(
                str(picture),
                f"{size_bytes} bytes are above the limit of {MAX_IMAGE_BYTES}; make it smaller",
            )
        )
    if len(name) > MAX_NAME_CHARACTERS:
        limit = f"{len(name)} characters of name are above the limit of {MAX_NAME_CHARACTERS}; rename it"
        violations.append(_violation(picture, limit))
    return LocalSample(name=name, path=picture, captions=captions, size_bytes=size_bytes, sha256=digest)


def _captions(picture: Path, is_needed: bool, violations: list[FieldViolation]) -> tuple[str, ...]:
    """Read the captions of one picture; what is wrong with them is a violation."""
    path = picture.with_suffix(".txt")
    if not path.exists():
        if is_needed:
            remedy = f"write its caption to {path.name}, or use --instance-prompt and give the job an instance_prompt"
            violations.append(_violation(picture, f"this picture has no caption; {remedy}"))
        return ()
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        violations.append(_violation(path, f"this file cannot be read: {error.strerror}"))
        return ()
    except UnicodeDecodeError as error:
        violations.append(_violation(path, _not_utf8(error)))
        return ()
    captions = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not captions and is_needed:
        violations.append(_violation(path, "this caption file is empty; write a caption into it"))
    violations += [
        _violation(
            f"{path}:{number}",
            f"this caption has {len(caption)} characters, above the limit of {MAX_CAPTION_CHARACTERS}; shorten it "
            "(the encoders see 128 tokens, about 500 characters)",
        )
        for number, caption in enumerate(captions, start=1)
        if len(caption) > MAX_CAPTION_CHARACTERS
    ]
    return captions


def _not_utf8(error: UnicodeDecodeError) -> str:
    remedy = "save it as UTF-8, for instance with: iconv -f ISO-8859-1 -t UTF-8"
    if error.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
        remedy = "it looks like UTF-16; save it as UTF-8, for instance with: iconv -f UTF-16 -t UTF-8"
    byte = error.object[error.start]
    return f"this caption is not UTF-8: byte 0x{byte:02x} at offset {error.start}; {remedy}"


def _duplicates(samples: Sequence[LocalSample]) -> Iterator[FieldViolation]:
    seen: dict[str, Path] = {}
    for sample in samples:
        first = seen.setdefault(sample.name, sample.path)
        if first != sample.path:
            yield _violation(
                str(sample.path),
                f"the name {sample.name} is also that of {first}; names are unique in a dataset: rename one",
            )
