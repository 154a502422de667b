"""Pages: sizes as the contract says, and tokens that only this service understands."""

import base64
import binascii
import json
from dataclasses import dataclass

from reverie_common.errors import FieldViolation, InvalidArgumentError

DEFAULT_PAGE_SIZE = 20
MAX_PAGE_SIZE = 100

# A page of jobs with long reports could pass the message limit of 4 MiB; it ends early instead.
MAX_PAGE_BYTES = 3 * 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """Which part of a list is asked for."""

    size: int
    after: str | None
    """Position of the last item of the page before; None for the first page."""


def read_page(page_size: int, page_token: str, list_name: str) -> Page:
    """Return the page that a request asks for; refuses a negative size and a token of another list."""
    if page_size < 0:
        raise InvalidArgumentError(
            f"page_size {page_size} is negative; 0 means {DEFAULT_PAGE_SIZE}",
            violations=[
                FieldViolation(field="page_size", description=f"{page_size} is negative; give 0 to {MAX_PAGE_SIZE}")
            ],
        )
    size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    return Page(size=size, after=_read_token(page_token, list_name) if page_token else None)


def write_token(list_name: str, position: str) -> str:
    """Return the token of the page that begins after `position`."""
    return base64.urlsafe_b64encode(json.dumps([list_name, position]).encode()).decode()


def _read_token(token: str, list_name: str) -> str:
    try:
        name, position = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (ValueError, binascii.Error, TypeError) as error:
        raise _wrong_token() from error
    if name != list_name or not isinstance(position, str):
        raise _wrong_token()
    return position


def _wrong_token() -> InvalidArgumentError:
    description = "it was not returned as next_page_token by this list; start again without it"
    return InvalidArgumentError(
        f"page_token is wrong: {description}", violations=[FieldViolation(field="page_token", description=description)]
    )
