"""Datasets of the Hugging Face Hub, or of a folder in its layout: rows in, pictures and captions out, part by part.

The `datasets` library reads them here, on the client's machine, with its own credentials; the services never see the
Hub. Pictures are taken as the files that they are and are not decoded.
"""

import hashlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from reverie_common.errors import InvalidArgumentError

from reverie_client.captions import import_extra, texts_of
from reverie_client.folder import LocalFolder, LocalSample

PART_SIZE = 256
"""Pictures that lie on this machine's disk at a time."""

_SIGNATURES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"BM": ".bmp", b"RIFF": ".webp"}


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSource:
    """Where pictures and captions are."""

    path: str
    """`org/name` on the Hub, or a folder in its layout."""
    split: str = "train"
    revision: str | None = None
    image_column: str = "image"
    caption_column: str = ""
    """Empty for pictures without captions."""
    limit: int = 0
    """Take only the first so many; 0 takes all."""


def read_hub(source: HubSource) -> Generator[LocalFolder, None, None]:
    """Yield a dataset's pictures in parts; a part's files are gone when the next one is asked for. Blocks.

    Raises:
        InvalidArgumentError: the dataset cannot be read, or has no such split or column, or no pictures.
    """
    num_read = 0
    rows = iter(_rows(source))
    while part := tuple(islice(rows, PART_SIZE)):
        with _part(source, part, num_read) as folder:
            yield folder
        num_read += len(part)
    if not num_read:
        raise InvalidArgumentError(f"no images detected in dataset {source.path!r}, split {source.split!r}")


def _rows(source: HubSource) -> Iterator[Mapping[str, Any]]:
    library = import_extra("datasets")
    try:
        rows = library.load_dataset(source.path, split=source.split, revision=source.revision, streaming=True)
        names = rows.column_names or list(rows.features or ())
        for column in filter(None, (source.image_column, source.caption_column)):
            if column not in names:
                raise InvalidArgumentError(
                    f"{source.path} has no column {column!r}, only {', '.join(names)}; name it with --image-column or "
                    "--caption-column"
                )
        rows = rows.cast_column(source.image_column, library.Image(decode=False))
        yield from rows.take(source.limit) if source.limit else rows
    except (OSError, ValueError, KeyError, library.exceptions.DatasetsError) as error:
        raise InvalidArgumentError(f"{source.path}, split {source.split!r}, cannot be read: {error}") from error


@contextmanager
def _part(source: HubSource, rows: tuple[Mapping[str, Any], ...], first: int) -> Iterator[LocalFolder]:
    """Write the pictures of some rows to this machine's disk for a while."""
    with TemporaryDirectory(prefix="reverie-") as directory:
        samples = [_sample(source, row, first + index, Path(directory)) for index, row in enumerate(rows)]
        yield LocalFolder(samples=tuple(samples), ignored=())


def _sample(source: HubSource, row: Mapping[str, Any], index: int, directory: Path) -> LocalSample:
    cell = row[source.image_column] or {}
    body = cell.get("bytes")
    if body is None and cell.get("path"):
        body = Path(cell["path"]).read_bytes()
    if not body:
        raise InvalidArgumentError(f"row {index} of {source.path} has no picture in column {source.image_column!r}")
    path = directory / f"{index:08d}"
    path.write_bytes(body)
    return LocalSample(
        name=_name(cell.get("path"), body, index),
        path=path,
        captions=texts_of(row.get(source.caption_column)) if source.caption_column else (),
        size_bytes=len(body),
        sha256=hashlib.sha256(body).hexdigest(),
    )


def _name(path: str | None, body: bytes, index: int) -> str:
    """Number the pictures: names in a dataset of the Hub need not be unique."""
    own = PurePosixPath(path).name if path else ""
    suffix = next((suffix for start, suffix in _SIGNATURES.items() if body.startswith(start)), ".img")
    return f"{index:08d}-{own}"[:255] if own else f"{index:08d}{suffix}"
