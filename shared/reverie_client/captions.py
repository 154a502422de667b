"""Where captions of pictures on this machine come from: text files, file names, or one table (spec 6.1, 6.2).

A table is a CSV or parquet file with a row for each picture. Not here: what a job does with captions.
"""

import csv
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from reverie_common.errors import FieldViolation, InvalidArgumentError

MAX_CAPTION_CHARACTERS = 8192

STRATEGIES = ("textfile", "filename", "none", "csv", "parquet")


class CaptionSource(Protocol):
    """Says which captions a picture has."""

    def captions_of(self, folder: Path, picture: Path, violations: list[FieldViolation]) -> tuple[str, ...]:
        """Return the captions of a picture below a folder, none where it has none; problems become violations."""
        ...

    def owns(self, file: Path) -> bool:
        """Whether a file that is no picture belongs to the captions."""
        ...

    def missing(self, picture: Path) -> str:
        """Say what to do about a picture without a caption."""
        ...


class TextFiles:
    """`<picture>.txt` beside a picture holds its captions, one on each line, in UTF-8."""

    def captions_of(self, folder: Path, picture: Path, violations: list[FieldViolation]) -> tuple[str, ...]:
        """See CaptionSource."""
        del folder
        path = picture.with_suffix(".txt")
        if not path.exists():
            return ()
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            violations.append(violation(path, f"this file cannot be read: {error.strerror}"))
            return ()
        except UnicodeDecodeError as error:
            violations.append(violation(path, _not_utf8(error)))
            return ()
        captions = tuple(line.strip() for line in text.splitlines() if line.strip())
        violations += [
            violation(f"{path}:{number}", too_long(caption))
            for number, caption in enumerate(captions, start=1)
            if len(caption) > MAX_CAPTION_CHARACTERS
        ]
        return captions

    def owns(self, file: Path) -> bool:
        """See CaptionSource."""
        return file.suffix == ".txt"

    def missing(self, picture: Path) -> str:
        """See CaptionSource."""
        path = picture.with_suffix(".txt")
        if path.exists():
            return "this caption file is empty; write a caption into it"
        remedy = f"write its caption to {path.name}, or use --instance-prompt and give the job an instance_prompt"
        return f"this picture has no caption; {remedy}"


class FileNames:
    """The name of a picture without its extension is its caption, with spaces for `_`."""

    def captions_of(self, folder: Path, picture: Path, violations: list[FieldViolation]) -> tuple[str, ...]:
        """See CaptionSource."""
        del folder, violations
        text = picture.stem.replace("_", " ").strip()
        return (text,) if text else ()

    def owns(self, file: Path) -> bool:
        """See CaptionSource."""
        del file
        return False

    def missing(self, picture: Path) -> str:
        """See CaptionSource."""
        del picture
        return "its name has no words; rename it"


class NoCaptions:
    """Pictures have none: the job gives an instance_prompt."""

    def captions_of(self, folder: Path, picture: Path, violations: list[FieldViolation]) -> tuple[str, ...]:
        """See CaptionSource."""
        del folder, picture, violations
        return ()

    def owns(self, file: Path) -> bool:
        """See CaptionSource."""
        del file
        return False

    def missing(self, picture: Path) -> str:
        """See CaptionSource."""
        del picture
        return "captions are left out; use --instance-prompt and give the job an instance_prompt"


@dataclass(frozen=True, kw_only=True, slots=True)
class TableColumns:
    """What the columns of a table are called."""

    filename: str = "filename"
    caption: str = "caption"
    fallback_caption: str = ""
    """Read where the caption is blank; empty is no such column."""
    includes_extension: bool = True
    """Whether file names in the table end in `.png` and so on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Captions of all pictures in one table."""

    path: Path
    columns: TableColumns
    captions: Mapping[str, tuple[str, ...]] = field(repr=False)

    def captions_of(self, folder: Path, picture: Path, violations: list[FieldViolation]) -> tuple[str, ...]:
        """See CaptionSource."""
        del violations
        relative = picture.relative_to(folder)
        named = relative if self.columns.includes_extension else relative.with_suffix("")
        return self.captions.get(named.as_posix()) or self.captions.get(named.name) or ()

    def owns(self, file: Path) -> bool:
        """See CaptionSource."""
        return file.resolve() == self.path.resolve()

    def missing(self, picture: Path) -> str:
        """See CaptionSource."""
        column = f"column {self.columns.caption!r} of {self.path.name}"
        return f"{column} has no caption for it; add a row for {picture.name}"


def open_captions(strategy: str, table: Path | None = None, columns: TableColumns | None = None) -> CaptionSource:
    """Return where captions come from; reads a table whole. Blocks.

    Raises:
        InvalidArgumentError: the strategy is unknown, or the table cannot be read.
    """
    plain: dict[str, type[TextFiles] | type[FileNames] | type[NoCaptions]] = {
        "textfile": TextFiles,
        "filename": FileNames,
        "none": NoCaptions,
    }
    if strategy in plain:
        return plain[strategy]()
    if strategy not in STRATEGIES:
        raise InvalidArgumentError(f"captions {strategy!r} are unknown; use one of {', '.join(STRATEGIES)}")
    if table is None:
        raise InvalidArgumentError(f"captions {strategy!r} need a table; name it with --caption-file FILE")
    columns = columns or TableColumns()
    return Table(path=table, columns=columns, captions=_collect(table, columns, _rows(strategy, table, columns)))


def _rows(strategy: str, path: Path, columns: TableColumns) -> Iterable[Mapping[str, Any]]:
    if not path.is_file():
        raise InvalidArgumentError(f"{path}: there is no such file; check the path of the captions")
    return csv_rows(path) if strategy == "csv" else _parquet_rows(path, columns)


def csv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a CSV file whose first line names its columns.

    Raises:
        InvalidArgumentError: it is not UTF-8, or no CSV file.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file)
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{path}: {_not_utf8(error)}") from error
    except (OSError, csv.Error) as error:
        raise InvalidArgumentError(f"{path} cannot be read as CSV: {error}") from error


def _parquet_rows(path: Path, columns: TableColumns) -> Iterator[Mapping[str, Any]]:
    arrow, parquet = import_extra("pyarrow"), import_extra("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(path)
        _require_columns(path, columns, file.schema_arrow.names)
        for batch in file.iter_batches(columns=_names(columns)):
            yield from batch.to_pylist()
    except (OSError, arrow.ArrowException) as error:
        raise InvalidArgumentError(f"{path} cannot be read as parquet: {error}") from error


def import_extra(name: str) -> ModuleType:
    """Import a library that the client alone does not need.

    Raises:
        InvalidArgumentError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InvalidArgumentError(
            f"{name.split('.')[0]} is not installed, which this needs: pip install 'reverie[imports]'",
            reason="EXTRA_MISSING",
        ) from error


def _names(columns: TableColumns) -> list[str]:
    return [name for name in (columns.filename, columns.caption, columns.fallback_caption) if name]


def _require_columns(path: Path, columns: TableColumns, found: Sequence[str]) -> None:
    """Refuse a table that lacks a column, with all that it has."""
    missing = [name for name in _names(columns) if name not in found]
    if missing:
        raise InvalidArgumentError(
            f"{path} has no column {missing[0]!r}, only {', '.join(map(str, found))}; name it with "
            "--filename-column, --caption-column or --fallback-caption-column"
        )


def _collect(path: Path, columns: TableColumns, rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Captions by file name; several rows of one name are alternatives."""
    found: dict[str, list[str]] = {}
    violations = []
    for number, row in enumerate(rows, start=1):
        _require_columns(path, columns, list(row))
        captions = texts_of(row[columns.caption]) or texts_of(row.get(columns.fallback_caption))
        violations += [
            violation(f"{path}:{number}", too_long(text)) for text in captions if len(text) > MAX_CAPTION_CHARACTERS
        ]
        found.setdefault(str(row[columns.filename]).replace("\\", "/").strip(), []).extend(captions)
    if violations:
        raise InvalidArgumentError(f"{path} has captions that are too long", violations=violations)
    return {name: tuple(dict.fromkeys(captions)) for name, captions in found.items()}


def texts_of(value: Any) -> tuple[str, ...]:
    """Return the texts of a table's cell: one, several as a list, or none."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(str(text).strip() for text in values if text is not None and str(text).strip())


def violation(path: Path | str, description: str) -> FieldViolation:
    """Return what is wrong with a file."""
    return FieldViolation(field=str(path), description=description)


def too_long(caption: str) -> str:
    """Say that a caption is too long."""
    return (
        f"this caption has {len(caption)} characters, above the limit of {MAX_CAPTION_CHARACTERS}; shorten it "
        "(the encoders see 128 tokens, about 500 characters)"
    )


def _not_utf8(error: UnicodeDecodeError) -> str:
    remedy = "save it as UTF-8, for instance with: iconv -f ISO-8859-1 -t UTF-8"
    if error.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
        remedy = "it looks like UTF-16; save it as UTF-8, for instance with: iconv -f UTF-16 -t UTF-8"
    byte = error.object[error.start]
    return f"this caption is not UTF-8: byte 0x{byte:02x} at offset {error.start}; {remedy}"
