"""Why an image file cannot be used. Reason names are those of `reverie.vae.v1.RejectionReason` without the prefix."""

from enum import StrEnum


class Reason(StrEnum):
    """A reason for programs; each has one meaning, written at the proto enum."""

    MISSING = "MISSING"
    EMPTY = "EMPTY"
    NOT_AN_IMAGE = "NOT_AN_IMAGE"
    CORRUPT = "CORRUPT"
    TOO_MANY_PIXELS = "TOO_MANY_PIXELS"
    ANIMATED = "ANIMATED"
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    TOO_MANY_BYTES = "TOO_MANY_BYTES"
    OTHER_PROPORTIONS = "OTHER_PROPORTIONS"


class ImageRejectedError(Exception):
    """One image cannot be used; the others of its request can. The message states value, limit and remedy."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
