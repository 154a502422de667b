"""An ObjectStore in this process's memory, with the semantics of the S3 one, for tests."""

import threading
from collections.abc import Iterator
from datetime import timedelta

from reverie_common.errors import ObjectNotFoundError
from reverie_common.storage.store import (
    OBJECT_MEDIA_TYPE,
    Body,
    ObjectInfo,
    key_in_bucket,
    refuse_oversize,
    require_digest,
    require_key,
    uri_of,
)


class MemoryStore:
    """An ObjectStore that forgets everything when the process ends."""

    def __init__(self, bucket: str = "memory") -> None:
        self.bucket = bucket
        self._objects: dict[str, bytes] = {}
        self._siblings: dict[str, MemoryStore] = {bucket: self}
        self._lock = threading.Lock()

    def get(self, key: str, *, sha256: str | None = None, max_size_bytes: int | None = None) -> bytes:
        """See ObjectStore."""
        body = self._objects.get(require_key(key))
        if body is None:
            raise ObjectNotFoundError(f"object {self.uri(key)} does not exist", metadata={"key": key})
        refuse_oversize(key, len(body), max_size_bytes)
        if sha256 is not None:
            require_digest(key, body, sha256)
        return body

    def create(self, key: str, body: Body, *, media_type: str = OBJECT_MEDIA_TYPE) -> bool:
        """See ObjectStore."""
        del media_type
        with self._lock:
            if require_key(key) in self._objects:
                return False
            self._objects[key] = bytes(body)
            return True

    def replace(self, key: str, body: Body, *, media_type: str = OBJECT_MEDIA_TYPE) -> None:
        """See ObjectStore."""
        del media_type
        with self._lock:
            self._objects[require_key(key)] = bytes(body)

    def copy(self, source_key: str, key: str) -> None:
        """See ObjectStore."""
        self.replace(key, self.get(source_key))

    def head(self, key: str) -> ObjectInfo | None:
        """See ObjectStore."""
        body = self._objects.get(require_key(key))
        return None if body is None else ObjectInfo(key=key, size_bytes=len(body))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See ObjectStore."""
        with self._lock:
            found = [ObjectInfo(key=key, size_bytes=len(body)) for key, body in self._objects.items()]
        return iter(sorted((info for info in found if info.key.startswith(prefix)), key=lambda info: info.key))

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        with self._lock:
            self._objects.pop(require_key(key), None)

    def uri(self, key: str) -> str:
        """See ObjectStore."""
        return uri_of(self.bucket, key)

    def key_of(self, uri: str) -> str:
        """See ObjectStore."""
        return key_in_bucket(self.bucket, uri)

    def sibling(self, bucket: str) -> "MemoryStore":
        """See ObjectStore."""
        with self._lock:
            if bucket not in self._siblings:
                other = MemoryStore(bucket)
                other._siblings = self._siblings
                self._siblings[bucket] = other
            return self._siblings[bucket]

    def presign_get(self, key: str, *, expires: timedelta) -> str:
        """A `memory://` URL: there is nobody else to give it to."""
        del expires
        return f"memory://{self.bucket}/{require_key(key)}"

    def presign_put(self, key: str, *, expires: timedelta) -> str:
        """A `memory://` URL: there is nobody else to give it to."""
        return self.presign_get(key, expires=expires)

    def check(self) -> None:
        """See ObjectStore; memory is always there."""
