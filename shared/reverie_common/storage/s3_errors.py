"""What an S3 server's answers and silences mean, as errors of reverie_common.errors."""

from dataclasses import dataclass
from xml.etree import ElementTree

import minio
import urllib3
from minio.error import InvalidResponseError, ServerError

from reverie_common.errors import (
    InternalError,
    NotFoundError,
    ObjectNotFoundError,
    ReverieError,
    StoreAccessError,
    StoreFullError,
    StoreUnavailableError,
)

ACCESS_CODES = frozenset(
    {
        "AccessDenied",
        "AccountProblem",
        "AllAccessDisabled",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
    }
)
FULL_CODES = frozenset({"EntityTooLargeForStorage", "InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"})
FULL_PHRASES = ("no free volumes", "no writable volumes", "no space left", "storage is full", "disk full")
BUSY_CODES = frozenset({"InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "SlowDownWrite"})

RETRY_AFTER_SECONDS = 5.0
FULL_RETRY_AFTER_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreAddress:
    """Where requests went, for messages."""

    endpoint: str
    bucket: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """An S3 server's answer other than success."""

    status: int
    """HTTP status."""

    code: str
    """S3's error code; empty if the answer had none."""

    message: str
    """The server's explanation."""


def refuse_status(response: urllib3.BaseHTTPResponse, address: StoreAddress, key: str) -> None:
    """Raise what an HTTP response means, unless it is success."""
    if 200 <= response.status < 300:
        return
    raise error_from_refusal(_parse_refusal(response.status, response.data), address, key)


def error_from_exception(error: Exception, address: StoreAddress, key: str) -> ReverieError:
    """What an exception of the `minio` client or of urllib3 means."""
    if isinstance(error, minio.S3Error):
        refusal = Refusal(status=error.response.status, code=error.code or "", message=error.message or "")
        return error_from_refusal(refusal, address, key)
    if isinstance(error, ServerError):
        return error_from_refusal(Refusal(status=error.status_code, code="", message=str(error)), address, key)
    if isinstance(error, InvalidResponseError):
        return error_from_refusal(Refusal(status=_status_of(error), code="", message=str(error)), address, key)
    return _unavailable(address, _root_cause(error))


def error_from_refusal(refusal: Refusal, address: StoreAddress, key: str) -> ReverieError:
    """What an S3 server's refusal means."""
    metadata = {"endpoint": address.endpoint, "bucket": address.bucket, "key": key, "code": refusal.code}
    if refusal.code == "NoSuchBucket":
        return NotFoundError(
            f"object store {address.endpoint} has no bucket {address.bucket!r}: create it, or set REVERIE_STORE_BUCKET",
            reason="BUCKET_NOT_FOUND",
            metadata=metadata,
        )
    if refusal.status == 404 or refusal.code == "NoSuchKey":
        return ObjectNotFoundError(f"object s3://{address.bucket}/{key} does not exist", metadata=metadata)
    if refusal.status in (401, 403) or refusal.code in ACCESS_CODES:
        return StoreAccessError(
            f"object store {address.endpoint} refused our credentials for bucket {address.bucket!r} "
            f"({refusal.code or refusal.status}): check REVERIE_STORE_ACCESS_KEY, REVERIE_STORE_SECRET_KEY, what they "
            "may do, and this machine's clock",
            metadata=metadata,
        )
    if is_full(refusal):
        return full_store(address, key, refusal.message[:200])
    if refusal.status >= 500 or refusal.status == 429 or refusal.code in BUSY_CODES:
        busy = _unavailable(address, f"HTTP {refusal.status} {refusal.code} {refusal.message[:200]}".rstrip())
        busy.metadata["status"] = str(refusal.status)
        return busy
    return InternalError(
        f"object store {address.endpoint} refused a request for {key}: HTTP {refusal.status} {refusal.code} "
        f"{refusal.message[:200]}",
        reason="STORE_REFUSED",
        metadata=metadata,
    )


def is_full(refusal: Refusal) -> bool:
    """Whether a refusal says that there is no room."""
    text = refusal.message.lower()
    return refusal.status == 507 or refusal.code in FULL_CODES or any(phrase in text for phrase in FULL_PHRASES)


def full_store(address: StoreAddress, key: str, cause: str) -> StoreFullError:
    """The error for a store without room."""
    return StoreFullError(
        f"object store {address.endpoint} answers, but takes no more objects: it is full, or its disk is; free or add "
        f"disk space, then repeat ({cause})",
        metadata={"endpoint": address.endpoint, "bucket": address.bucket, "key": key, "cause": cause},
        retry_after_seconds=FULL_RETRY_AFTER_SECONDS,
    )


def _unavailable(address: StoreAddress, cause: str) -> StoreUnavailableError:
    return StoreUnavailableError(
        f"object store {address.endpoint} does not answer ({cause}): start it, or set REVERIE_STORE_ENDPOINT",
        metadata={"endpoint": address.endpoint, "cause": cause},
        retry_after_seconds=RETRY_AFTER_SECONDS,
    )


def _root_cause(error: BaseException) -> str:
    reason = getattr(error, "reason", None)
    inner = reason if isinstance(reason, BaseException) else error.__cause__
    return _root_cause(inner) if inner is not None else f"{type(error).__name__}: {error}"[:200]


def _status_of(error: InvalidResponseError) -> int:
    return int(error.args[0].split("Response code: ", 1)[1].split(",", 1)[0])


def _parse_refusal(status: int, body: bytes) -> Refusal:
    text = body.decode(errors="replace")
    try:
        # An S3 error document is a handful of elements; expat refuses entity bombs by itself since 2.4.
        root = ElementTree.fromstring(text)  # noqa: S314  # it comes from our own store
    except ElementTree.ParseError:
        return Refusal(status=status, code="", message=text[:500])
    texts = {element.tag.rsplit("}", 1)[-1]: element.text or "" for element in root}
    return Refusal(status=status, code=texts.get("Code", ""), message=texts.get("Message", ""))
