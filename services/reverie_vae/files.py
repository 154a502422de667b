"""Image files in the store, and reading one of them: what is wrong with the file becomes an ImageRejectedError."""

from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from reverie_common.errors import IntegrityError, InvalidArgumentError, ObjectNotFoundError
from reverie_common.storage import ObjectInfo, ObjectStore

from reverie_vae.images import refuse_large_file
from reverie_vae.limits import MAX_FILE_BYTES
from reverie_vae.rejections import ImageRejectedError, Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFile:
    """One image file in the store."""

    key: str
    sha256: str
    """Lower-case hex digest of its bytes."""
    size_bytes: int
    """As its reference says; 0 says nothing."""
    bucket: str = ""
    """Where it is; empty is this service's own bucket."""


class ImageSources:
    """The buckets that image files may be in: this service's own, and others of its server that it may read."""

    def __init__(self, store: ObjectStore, others: Iterable[str] = ()) -> None:
        self._stores = {"": store, **{bucket: store.sibling(bucket) for bucket in others if bucket != store.bucket}}
        self._own_bucket = store.bucket

    def locate(self, uri: str) -> tuple[str, str]:
        """Return (bucket, key) of a URI; the bucket is empty for this service's own.

        Raises:
            InvalidArgumentError: it is in no bucket that may be read.
        """
        bucket = urlsplit(uri).netloc
        if bucket != self._own_bucket and bucket in self._stores:
            return bucket, self._stores[bucket].key_of(uri)
        return "", self._stores[""].key_of(uri)

    def store_of(self, file: ImageFile) -> ObjectStore:
        """Return the store that holds a file."""
        return self._stores[file.bucket]


def fetch_image(store: ObjectStore, file: ImageFile) -> bytes:
    """Read one file whole and check its digest. Blocks.

    Raises:
        ImageRejectedError: it is missing, too large, or not what the reference says.
        StoreUnavailableError: the store does not answer, which is nothing that the file is to blame for.
    """
    refuse_large_file(file.size_bytes)
    try:
        return store.get(file.key, sha256=file.sha256, max_size_bytes=MAX_FILE_BYTES)
    except ObjectNotFoundError as error:
        raise _missing(file) from error
    except IntegrityError as error:
        message = f"{error.message}; upload the file again"
        raise ImageRejectedError(Reason.DIGEST_MISMATCH, message) from error
    except InvalidArgumentError as error:
        raise ImageRejectedError(Reason.TOO_MANY_BYTES, error.message) from error


def require_stored(store: ObjectStore, file: ImageFile) -> None:
    """Check that the file is there, without reading it. Blocks.

    Raises:
        ImageRejectedError: it is missing, or has another size than the reference says.
    """
    info = store.head(file.key)
    if info is None:
        raise _missing(file)
    if file.size_bytes and info.size_bytes != file.size_bytes:
        raise _other_size(file, info)


def _missing(file: ImageFile) -> ImageRejectedError:
    return ImageRejectedError(Reason.MISSING, f"object {file.key} is not in the store; upload the file again")


def _other_size(file: ImageFile, info: ObjectInfo) -> ImageRejectedError:
    return ImageRejectedError(
        Reason.DIGEST_MISMATCH,
        f"object {file.key} has {info.size_bytes} bytes, its reference says {file.size_bytes}; upload the file again",
    )
