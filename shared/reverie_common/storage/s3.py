"""An ObjectStore on any S3 server, through the `minio` client.

Writes that must not overwrite go by a presigned PUT with `If-None-Match: *`: the client's own put_object silently turns
that header into metadata and overwrites. The region is given, so the client never asks for it.
"""

import io
from collections.abc import Callable, Iterator
from copy import copy
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import TypeVar, cast
from urllib.parse import urlsplit

import minio
import urllib3
from minio.commonconfig import CopySource

from reverie_common.errors import InvalidArgumentError, NotFoundError, ObjectNotFoundError, ReverieError
from reverie_common.settings import StoreSettings
from reverie_common.storage.s3_errors import StoreAddress, refuse_status
from reverie_common.storage.s3_retries import Retries
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
from reverie_common.telemetry.metrics import STORE_BYTES

T = TypeVar("T")

Page = tuple[ObjectInfo, ...]

MAX_CONNECTIONS = 64
CONNECT_TIMEOUT_SECONDS = 5.0
READ_TIMEOUT_SECONDS = 60.0

# Below this, a refused PUT costs what a HEAD costs; above, asking first saves sending the body.
ASK_FIRST_BYTES = 4 * 1024 * 1024

# S3 takes up to 5 GiB in one PUT; the client's default of 5 MiB would turn larger bodies into multipart uploads.
MAX_SINGLE_PUT_BYTES = 5 * 1024**3
MIN_PART_BYTES = 5 * 1024**2

# S3's own page size: one request for each page.
LIST_PAGE_KEYS = 1000

WRITE_URL_EXPIRY = timedelta(hours=1)


class S3Store:
    """An ObjectStore on one bucket of an S3 server."""

    def __init__(
        self,
        endpoint: str,
        bucket: str,
        access_key: str,
        secret_key: str,
        *,
        region: str = "us-east-1",
        public_endpoint: str | None = None,
        retry_seconds: float = 60.0,
    ) -> None:
        """Connects to nothing yet.

        Args:
            endpoint: `host:port` for plain HTTP, or `http(s)://host[:port]`.
            bucket: the bucket, which must exist.
            access_key: who we are.
            secret_key: the proof.
            region: region that requests are signed for.
            public_endpoint: endpoint in presigned URLs, if clients know the store by another name.
            retry_seconds: how long connection failures and server errors are retried; 0 tries once.
        """
        self.bucket = bucket
        self.endpoint = endpoint
        self._http = urllib3.PoolManager(
            maxsize=MAX_CONNECTIONS,
            retries=urllib3.Retry(total=0),
            timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_SECONDS, read=READ_TIMEOUT_SECONDS),
        )
        self._client = self._connect(endpoint, access_key, secret_key, region)
        self._public = self._connect(public_endpoint or endpoint, access_key, secret_key, region)
        self._address = StoreAddress(endpoint=endpoint, bucket=bucket)
        self._retries = Retries(limit_seconds=retry_seconds, address=self._address)

    def _connect(self, endpoint: str, access_key: str, secret_key: str, region: str) -> minio.Minio:
        url = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
        if url.scheme not in ("http", "https") or not url.netloc or url.path not in ("", "/"):
            raise InvalidArgumentError(
                f"store endpoint {endpoint!r} is wrong: write host:port or http(s)://host[:port]; "
                "set REVERIE_STORE_ENDPOINT",
                metadata={"endpoint": endpoint},
            )
        return minio.Minio(
            url.netloc,
            access_key=access_key,
            secret_key=secret_key,
            secure=url.scheme == "https",
            region=region,
            http_client=self._http,
        )

    def get(self, key: str, *, sha256: str | None = None, max_size_bytes: int | None = None) -> bytes:
        """See ObjectStore."""
        require_key(key)
        body = self._perform("get", key, lambda: self._read(key, max_size_bytes))
        if sha256 is not None:
            require_digest(key, body, sha256)
        STORE_BYTES.labels("get").inc(len(body))
        return body

    def _read(self, key: str, max_size_bytes: int | None) -> bytes:
        response = self._client.get_object(self.bucket, key)
        try:
            refuse_oversize(key, int(response.headers.get("content-length", 0)), max_size_bytes)
            return bytes(response.data)
        finally:
            response.close()
            response.release_conn()

    def create(self, key: str, body: Body, *, media_type: str = OBJECT_MEDIA_TYPE) -> bool:
        """See ObjectStore.

        When the answer to a write was lost and the write was repeated, False may mean that the first try succeeded.
        """
        require_key(key)
        size_bytes = memoryview(body).nbytes
        if size_bytes >= ASK_FIRST_BYTES and self.head(key) is not None:
            return False
        created = self._write("create", key, lambda: self._put_if_absent(key, body, media_type))
        if created:
            STORE_BYTES.labels("create").inc(size_bytes)
        return created

    def _put_if_absent(self, key: str, body: Body, media_type: str) -> bool:
        url = self._client.presigned_put_object(self.bucket, key, expires=WRITE_URL_EXPIRY)
        headers = {"If-None-Match": "*", "Content-Type": media_type}
        # urllib3 sends any buffer without copying it, but its annotation lists bytes only.
        response = self._http.request("PUT", url, body=cast(bytes, body), headers=headers)
        if response.status == 412:
            return False
        refuse_status(response, self._address, key)
        return True

    def replace(self, key: str, body: Body, *, media_type: str = OBJECT_MEDIA_TYPE) -> None:
        """See ObjectStore."""
        require_key(key)
        length = memoryview(body).nbytes
        part_size = min(max(length, MIN_PART_BYTES), MAX_SINGLE_PUT_BYTES)
        self._write(
            "replace",
            key,
            lambda: self._client.put_object(
                self.bucket, key, io.BytesIO(body), length, content_type=media_type, part_size=part_size
            ),
        )
        STORE_BYTES.labels("replace").inc(length)

    def copy(self, source_key: str, key: str) -> None:
        """See ObjectStore; the bytes do not pass through this process. S3 copies at most 5 GiB at once."""
        source = CopySource(self.bucket, require_key(source_key))
        require_key(key)
        # The error of a missing source names the target; who reads it wants the source.
        if self.head(source_key) is None:
            raise ObjectNotFoundError(f"object {self.uri(source_key)} does not exist", metadata={"key": source_key})
        self._write("copy", key, lambda: self._client.copy_object(self.bucket, key, source))

    def head(self, key: str) -> ObjectInfo | None:
        """See ObjectStore."""
        require_key(key)
        return self._perform("head", key, lambda: self._stat(key))

    def _stat(self, key: str) -> ObjectInfo | None:
        try:
            found = self._client.stat_object(self.bucket, key)
        except minio.S3Error as error:
            if error.code == "NoSuchKey":
                return None
            raise
        return ObjectInfo(key=key, size_bytes=found.size or 0)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See ObjectStore; reads page by page, and a page that fails is asked for again."""
        last_key: str | None = None
        while True:
            page = self._perform("list", prefix, partial(self._list_page, prefix, last_key))
            yield from page
            if len(page) < LIST_PAGE_KEYS:
                return
            last_key = page[-1].key

    def _list_page(self, prefix: str, start_after: str | None) -> Page:
        found = self._client.list_objects(self.bucket, prefix=prefix, recursive=True, start_after=start_after)
        return tuple(
            ObjectInfo(key=entry.object_name, size_bytes=entry.size or 0) for entry in islice(found, LIST_PAGE_KEYS)
        )

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        require_key(key)
        self._perform("delete", key, lambda: self._client.remove_object(self.bucket, key))

    def uri(self, key: str) -> str:
        """See ObjectStore."""
        return uri_of(self.bucket, key)

    def key_of(self, uri: str) -> str:
        """See ObjectStore."""
        return key_in_bucket(self.bucket, uri)

    def sibling(self, bucket: str) -> "S3Store":
        """See ObjectStore; shares the connections."""
        other = copy(self)
        other.bucket = bucket
        other._address = StoreAddress(endpoint=self.endpoint, bucket=bucket)
        other._retries = Retries(limit_seconds=self._retries.limit_seconds, address=other._address)
        return other

    def presign_get(self, key: str, *, expires: timedelta) -> str:
        """See ObjectStore; signs without asking the store."""
        return str(self._public.presigned_get_object(self.bucket, require_key(key), expires=expires))

    def presign_put(self, key: str, *, expires: timedelta) -> str:
        """See ObjectStore; signs without asking the store."""
        return str(self._public.presigned_put_object(self.bucket, require_key(key), expires=expires))

    def check(self) -> None:
        """See ObjectStore; asks once, whatever retry_seconds is."""
        if not self._bucket_exists():
            raise NotFoundError(
                f"object store {self.endpoint} has no bucket {self.bucket!r}: create it, or set REVERIE_STORE_BUCKET",
                reason="BUCKET_NOT_FOUND",
                metadata={"endpoint": self.endpoint, "bucket": self.bucket},
            )

    def make_bucket(self) -> None:
        """Create the bucket, for a store of one's own such as the embedded one; no error if it is there."""
        self._perform("make_bucket", self.bucket, self._make_bucket)

    def _make_bucket(self) -> None:
        if not self._client.bucket_exists(self.bucket):
            self._client.make_bucket(self.bucket)

    def _bucket_exists(self) -> bool:
        once = Retries(limit_seconds=0.0, address=self._address)
        return once.perform("check", self.bucket, lambda: bool(self._client.bucket_exists(self.bucket)))

    def _can_read(self) -> bool:
        try:
            return self._bucket_exists()
        except ReverieError:
            return False

    def _write(self, operation: str, key: str, request: Callable[[], T]) -> T:
        return self._retries.perform(operation, key, request, can_read=self._can_read)

    def _perform(self, operation: str, key: str, request: Callable[[], T]) -> T:
        return self._retries.perform(operation, key, request)


def open_store(settings: StoreSettings) -> S3Store:
    """Make the store that a process's settings name; connects to nothing yet, see ObjectStore.check.

    Raises:
        InvalidArgumentError: credentials are missing.
    """
    access_key = settings.store_access_key.get_secret_value()
    secret_key = settings.store_secret_key.get_secret_value()
    if not access_key or not secret_key:
        raise InvalidArgumentError(
            "the object store's credentials are missing: set REVERIE_STORE_ACCESS_KEY and REVERIE_STORE_SECRET_KEY, or "
            "--store-access-key-file and --store-secret-key-file",
            reason="STORE_CREDENTIALS_MISSING",
        )
    return S3Store(
        settings.store_endpoint,
        settings.store_bucket,
        access_key,
        secret_key,
        region=settings.store_region,
        public_endpoint=settings.store_public_endpoint,
        retry_seconds=settings.store_retry_seconds,
    )
