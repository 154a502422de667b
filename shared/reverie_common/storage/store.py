"""The one seam to the object store: the Protocol, its values, and the rules that hold for every implementation."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from reverie_common.errors import IntegrityError, InvalidArgumentError

OBJECT_MEDIA_TYPE = "application/octet-stream"
JSON_MEDIA_TYPE = "application/json"

# S3's limit for a key, in bytes of UTF-8.
MAX_KEY_BYTES = 1024

Body = bytes | bytearray | memoryview


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectInfo:
    """What a listing or a HEAD tells about one object."""

    key: str
    """Key within the bucket."""

    size_bytes: int
    """Size of the stored bytes."""


class ObjectStore(Protocol):
    """One bucket of an S3 store. Every method blocks and may be called from any thread.

    Coroutines call it through asyncio.to_thread. Everything but `replace` may be repeated safely. All methods raise
    StoreUnavailableError when the store does not answer and StoreAccessError when it refuses the credentials; a missing
    bucket is a NotFoundError with reason BUCKET_NOT_FOUND.
    """

    bucket: str

    def get(self, key: str, *, sha256: str | None = None, max_size_bytes: int | None = None) -> bytes:
        """Read one object whole.

        Args:
            key: key within the bucket.
            sha256: hex digest that the bytes must have; None trusts them.
            max_size_bytes: refuse a larger object before it is read.

        Raises:
            ObjectNotFoundError: there is none.
            IntegrityError: its digest is another one.
            InvalidArgumentError: it is larger than max_size_bytes.
        """
        ...

    def create(self, key: str, body: Body, *, media_type: str = OBJECT_MEDIA_TYPE) -> bool:
        """Write an object only if there is none; True if it was written, False if one was there and is kept.

        Raises:
            StoreFullError: no room is left.
        """
        ...

    def replace(self, key: str, body: Body, *, media_type: str = OBJECT_MEDIA_TYPE) -> None:
        """Write one of the few mutable pointers, whatever was there.

        Raises:
            StoreFullError: no room is left.
        """
        ...

    def copy(self, source_key: str, key: str) -> None:
        """Write an object's bytes under another key too, inside the store; what was there is replaced.

        Raises:
            ObjectNotFoundError: there is no source.
            StoreFullError: no room is left.
        """
        ...

    def head(self, key: str) -> ObjectInfo | None:
        """Tell an object's size without reading it; None if there is none."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """List the objects whose key starts with a prefix, in key order."""
        ...

    def delete(self, key: str) -> None:
        """Delete an object; no error if there is none."""
        ...

    def uri(self, key: str) -> str:
        """Name an object for a reference: `s3://<bucket>/<key>`."""
        ...

    def key_of(self, uri: str) -> str:
        """Key of a reference's URI.

        Raises:
            InvalidArgumentError: the URI is not of this bucket.
        """
        ...

    def sibling(self, bucket: str) -> "ObjectStore":
        """Another bucket of the same server, under the same credentials; it need not exist yet."""
        ...

    def presign_get(self, key: str, *, expires: timedelta) -> str:
        """URL with which anyone may read one object until it expires (at most 7 days)."""
        ...

    def presign_put(self, key: str, *, expires: timedelta) -> str:
        """URL with which anyone may write one object until it expires (at most 7 days)."""
        ...

    def check(self) -> None:
        """Prove that the store answers, takes our credentials and has our bucket.

        Raises:
            StoreUnavailableError, StoreAccessError, NotFoundError: with the remedy.
        """
        ...


def require_key(key: str) -> str:
    """Refuse keys that stores disagree about.

    Raises:
        InvalidArgumentError: the key is empty, too long, or has empty or dotted parts.
    """
    parts = key.split("/")
    if not key or len(key.encode()) > MAX_KEY_BYTES or any(part in ("", ".", "..") for part in parts):
        raise InvalidArgumentError(
            f"object key {key[:100]!r} is refused: a key has 1 to {MAX_KEY_BYTES} bytes and no empty, '.' or '..' part",
            reason="INVALID_OBJECT_KEY",
            metadata={"key": key[:100]},
        )
    return key


def uri_of(bucket: str, key: str) -> str:
    """`s3://<bucket>/<key>`."""
    return f"s3://{bucket}/{require_key(key)}"


def key_in_bucket(bucket: str, uri: str) -> str:
    """Key of an `s3://<bucket>/<key>` URI.

    Raises:
        InvalidArgumentError: it is another scheme or another bucket.
    """
    prefix = f"s3://{bucket}/"
    if not uri.startswith(prefix):
        raise InvalidArgumentError(
            f"{uri[:200]!r} is not in this store; expected {prefix}<key>",
            reason="FOREIGN_URI",
            metadata={"uri": uri[:200], "bucket": bucket},
        )
    return require_key(uri.removeprefix(prefix))


def require_digest(key: str, body: Body, sha256: str) -> None:
    """Prove that bytes are those that were written.

    Raises:
        IntegrityError: the digest is another one.
    """
    refuse_other_digest(key, actual=hashlib.sha256(body).hexdigest(), expected=sha256)


def refuse_other_digest(key: str, *, actual: str, expected: str) -> None:
    """Raise IntegrityError unless two hex digests are the same."""
    if actual != expected.lower():
        raise IntegrityError(
            f"object {key} has sha256 {actual}, expected {expected}: it was damaged or replaced; delete it and let it "
            "be made again",
            metadata={"key": key, "sha256": actual, "expected_sha256": expected},
        )


def refuse_oversize(key: str, size_bytes: int, max_size_bytes: int | None) -> None:
    """Raise InvalidArgumentError for an object above the reader's limit."""
    if max_size_bytes is not None and size_bytes > max_size_bytes:
        raise InvalidArgumentError(
            f"object {key} has {size_bytes} bytes, the limit is {max_size_bytes}",
            reason="OBJECT_TOO_LARGE",
            metadata={"key": key, "size_bytes": str(size_bytes), "max_size_bytes": str(max_size_bytes)},
        )
