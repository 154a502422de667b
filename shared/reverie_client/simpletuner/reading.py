"""SimpleTuner's configuration folder as it is: JSON with trailing commas, comments and paths from elsewhere.

Only JSON is read; SimpleTuner's other formats are refused with what to do about it (spec 5.1).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from reverie_common.errors import InvalidArgumentError, NotFoundError

MAIN_FILE = "config.json"
OTHER_FORMATS = ("config.toml", "config.env", "config.sh")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigFolder:
    """A folder that holds config.json and, mostly, what it names."""

    path: Path
    main: Path
    """The file with the options."""

    def find(self, named: str) -> Path | None:
        """Return the file that a path in the configuration means, or None.

        SimpleTuner runs in the folder above `config/`, so its paths begin with `config/`, and often with the folder of
        an environment too. Tried in this order: as it is, below this folder, below the one above, and then below this
        folder without its first parts, one by one.
        """
        parts = PurePosixPath(named.replace("\\", "/")).parts
        places = [Path(named)] if Path(named).is_absolute() else []
        places += [self.path.joinpath(*parts), self.path.parent.joinpath(*parts)]
        places += [self.path.joinpath(*parts[start:]) for start in range(1, len(parts))]
        return next((place for place in places if place.is_file()), None)

    def require(self, named: str, option: str) -> Path:
        """Return the file that an option names. Raises NotFoundError."""
        found = self.find(named)
        if found is None:
            raise NotFoundError(
                f"{option} names {named}, and there is no such file in {self.path}; put it there under that name",
                reason="NO_CONFIG_FILE",
            )
        return found

    def others(self, read: Iterable[Path]) -> list[Path]:
        """JSON files of the folder that were not read."""
        known = {path.resolve() for path in read}
        return [path for path in sorted(self.path.glob("*.json")) if path.resolve() not in known]


def open_config(place: Path) -> ConfigFolder:
    """Find config.json in a folder; the file itself may be given too.

    Raises:
        NotFoundError: there is none.
        InvalidArgumentError: the configuration is in a format that is not read.
    """
    if place.is_file() and place.suffix == ".json":
        return ConfigFolder(path=place.parent, main=place)
    folder = place.parent if place.is_file() else place
    main = folder / MAIN_FILE
    if main.is_file() and not place.is_file():
        return ConfigFolder(path=folder, main=main)
    other = (
        place if place.is_file() else next((folder / name for name in OTHER_FORMATS if (folder / name).exists()), None)
    )
    if other is not None:
        raise InvalidArgumentError(
            f"{other} is not JSON, and only SimpleTuner's JSON configuration is read; write its options into "
            f'{folder / MAIN_FILE}, as {{"option": value}} with the names of the command line',
            reason="NOT_JSON",
        )
    raise NotFoundError(f"there is no {MAIN_FILE} in {place}; give the folder that holds it", reason="NO_CONFIG_FILE")


def read_json(path: Path) -> Any:
    """Read a JSON file that may have trailing commas and comments.

    Raises:
        NotFoundError: there is no such file.
        InvalidArgumentError: it cannot be read, with line and column.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist; check the path", reason="NO_CONFIG_FILE") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{path} cannot be read as UTF-8: {error}", reason="NOT_JSON") from error
    return parse_json(text, str(path))


def parse_json(text: str, name: str) -> Any:
    """Return what a JSON text says; see `read_json`. A key that stands twice is an error: one of both would be lost."""
    try:
        return json.loads(_without_extras(text), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidArgumentError(f"{name} is not JSON: {where}: {error.msg}", reason="NOT_JSON") from None
    except _DuplicateKeyError as error:
        raise InvalidArgumentError(
            f"{name} has the key {error.args[0]!r} twice in one object; remove one", reason="NOT_JSON"
        ) from None
    except RecursionError:
        raise InvalidArgumentError(f"{name} is nested too deeply", reason="NOT_JSON") from None


class _DuplicateKeyError(ValueError):
    """One key stands twice in one object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKeyError(key)
        found[key] = value
    return found


def _without_extras(text: str) -> str:
    """Blank out comments and trailing commas; every other character stays where it is, so that errors point right."""
    pieces: list[str] = []
    comma: int | None = None
    for piece in _pieces(text):
        if piece[0] in "]}" and comma is not None:
            pieces[comma] = " "
        if not piece.isspace():
            comma = len(pieces) if piece == "," else None
        pieces.append(piece)
    return "".join(pieces)


def _pieces(text: str) -> Iterator[str]:
    """Cut a text into strings, single characters, and comments as blanks of the same length."""
    start = 0
    while start < len(text):
        end = _end_of_piece(text, start)
        piece = text[start:end]
        is_comment = piece[0] == "#" or piece[:2] in ("//", "/*")
        yield "".join(each if each == "\n" else " " for each in piece) if is_comment else piece
        start = end


def _end_of_piece(text: str, start: int) -> int:
    if text[start] == '"':
        return _end_of_string(text, start)
    if text[start] == "#" or text.startswith("//", start):
        end = text.find("\n", start)
        return len(text) if end < 0 else end
    if text.startswith("/*", start):
        end = text.find("*/", start + 2)
        return len(text) if end < 0 else end + 2
    return start + 1


def _end_of_string(text: str, start: int) -> int:
    place = start + 1
    while place < len(text) and text[place] != '"':
        place += 2 if text[place] == "\\" else 1
    return min(place + 1, len(text))


def option_name(key: str) -> str:
    """Return an option's name without the dashes of the command line: `--seed` and `seed` are one."""
    return key.strip().lstrip("-").replace("-", "_")


def require_object(document: Any, name: str) -> Mapping[str, Any]:
    """Return a document that must be an object. Raises InvalidArgumentError."""
    if not isinstance(document, Mapping):
        raise InvalidArgumentError(f"{name} holds no JSON object", reason="NOT_JSON")
    return document
