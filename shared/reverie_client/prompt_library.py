"""A user's prompt library: SimpleTuner's JSON object from short names to prompts, read as it is (spec 7.2).

    {"anime_<token>": "a breathtaking anime-style portrait of <token>",
     "figurine": {"prompt": "a figurine on a desk", "adapter_strength": 0.8}}

Short names become parts of file names, so they are made safe here, the same way every time, and every change is told.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reverie.training.v1.job_pb2 import TrainingJobSpec, ValidationPrompt
from reverie_common.errors import FieldViolation, InvalidArgumentError, NotFoundError

from reverie_client.documents import parse

MAX_NAME_CHARACTERS = 63
RESERVED_PREFIX = "lib-"
RESERVED_NAMES = ("unconditional",)
"""What the trainer calls the empty prompt; the names of its built-in prompts begin with RESERVED_PREFIX."""

_KNOWN_KEYS = ("prompt", "adapter_strength")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLibrary:
    """What was read of a library."""

    prompts: tuple[ValidationPrompt, ...]
    """In the order of the file."""
    notes: tuple[str, ...]
    """What is not as it stands in the file: names that were made safe, keys that mean nothing here."""


def read_prompt_library(path: Path, *, taken: Iterable[str] = ()) -> PromptLibrary:
    """Read a library file; trailing commas and comments are tolerated.

    Args:
        path: the JSON file.
        taken: names that the job has already.

    Raises:
        NotFoundError: there is no such file.
        InvalidArgumentError: it is no library; with every entry that cannot be used.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        message = f"the prompt library {path} does not exist; check the path"
        raise NotFoundError(message, reason="NO_PROMPT_LIBRARY") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"the prompt library {path} cannot be read as UTF-8: {error}") from error
    return parse_prompt_library(parse(text, str(path)), name=str(path), taken=taken)


def parse_prompt_library(document: Any, *, name: str, taken: Iterable[str] = ()) -> PromptLibrary:
    """Turn a library that was parsed into prompts; `name` is what errors call it. See `read_prompt_library`."""
    if not isinstance(document, Mapping):
        raise InvalidArgumentError(
            f"{name} is no prompt library: it is an object from short names to prompts, for instance "
            '{"cat": "a photo of a cat"}',
            reason="INVALID_PROMPT_LIBRARY",
        )
    reader = _Reader({*taken, *RESERVED_NAMES})
    for short_name, entry in document.items():
        reader.add(str(short_name), entry)
    if reader.violations:
        count = len(reader.violations)
        raise InvalidArgumentError(
            f"{count} {'prompt is' if count == 1 else 'prompts are'} wrong in {name}",
            reason="INVALID_PROMPT_LIBRARY",
            violations=reader.violations,
        )
    return PromptLibrary(prompts=tuple(reader.prompts), notes=tuple(reader.notes))


def add_prompts(spec: TrainingJobSpec, path: Path) -> tuple[str, ...]:
    """Add a library's prompts to those of a job; returns what is not as it stands in the file.

    Raises:
        NotFoundError, InvalidArgumentError: see `read_prompt_library`.
    """
    library = read_prompt_library(path, taken=[prompt.name for prompt in spec.validation.prompts])
    spec.validation.prompts.extend(library.prompts)
    return library.notes


def safe_name(short_name: str) -> str:
    """Turn a short name into 1 to 63 of [a-z0-9_-]: accents go, spaces become _, everything else is left out.

    A name of which nothing is left, in a script without Latin letters for instance, is named after its digest.
    """
    plain = unicodedata.normalize("NFKD", short_name).lower()
    words = re.sub(r"[\s./\\]+", "_", plain.strip())
    name = re.sub(r"[^a-z0-9_-]", "", words).strip("_-")[:MAX_NAME_CHARACTERS]
    if not name:
        return f"prompt-{hashlib.sha256(short_name.encode()).hexdigest()[:8]}"
    return f"user-{name}"[:MAX_NAME_CHARACTERS] if name.startswith(RESERVED_PREFIX) else name


class _Reader:
    """Collects prompts and what is wrong with them."""

    def __init__(self, taken: set[str]) -> None:
        self.prompts: list[ValidationPrompt] = []
        self.notes: list[str] = []
        self.violations: list[FieldViolation] = []
        self._taken = taken

    def add(self, short_name: str, entry: Any) -> None:
        if isinstance(entry, str):
            self._keep(short_name, ValidationPrompt(prompt=entry))
        elif isinstance(entry, Mapping) and isinstance(entry.get("prompt"), str):
            self._add_object(short_name, entry)
        else:
            self._refuse(short_name, 'it is neither a text nor an object with a "prompt"')

    def _add_object(self, short_name: str, entry: Mapping[str, Any]) -> None:
        prompt = ValidationPrompt(prompt=entry["prompt"])
        if entry.get("adapter_strength") is not None:
            try:
                prompt.adapter_strength = float(entry["adapter_strength"])
            except (TypeError, ValueError):
                self._refuse(f"{short_name}.adapter_strength", f"{entry['adapter_strength']!r} is not a number")
                return
        unknown = ", ".join(repr(key) for key in entry if key not in _KNOWN_KEYS)
        if unknown:
            self.notes.append(f"prompt {short_name!r}: {unknown} means nothing here and is left out")
        self._keep(short_name, prompt)

    def _keep(self, short_name: str, prompt: ValidationPrompt) -> None:
        prompt.name = self._unique(safe_name(short_name))
        self._taken.add(prompt.name)
        if prompt.name != short_name:
            self.notes.append(f"prompt {short_name!r} is named {prompt.name}, because names become file names")
        self.prompts.append(prompt)

    def _unique(self, name: str) -> str:
        number, unique = 1, name
        while unique in self._taken:
            number += 1
            suffix = f"-{number}"
            unique = name[: MAX_NAME_CHARACTERS - len(suffix)] + suffix
        return unique

    def _refuse(self, field: str, description: str) -> None:
        self.violations.append(FieldViolation(field=field, description=description))
