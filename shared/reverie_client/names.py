"""Names that Reverie takes, made of names that it does not: the same way every time."""

import hashlib
import re
import unicodedata
from collections.abc import Container

MAX_CHARACTERS = 63


def plain_name(text: str, kind: str) -> str:
    """Turn a text into 1 to 63 of [a-z0-9-]; one of which nothing is left is named after its digest."""
    letters = unicodedata.normalize("NFKD", text).lower()
    letters = "".join(each for each in letters if not unicodedata.combining(each))
    name = re.sub(r"[^a-z0-9]+", "-", letters).strip("-")[:MAX_CHARACTERS].strip("-")
    return name or f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def unique_name(name: str, taken: Container[str]) -> str:
    """Return the name, or the name with the first free number after it."""
    number, unique = 1, name
    while unique in taken:
        number += 1
        suffix = f"-{number}"
        unique = name[: MAX_CHARACTERS - len(suffix)] + suffix
    return unique
