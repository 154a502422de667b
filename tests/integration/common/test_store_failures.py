"""A store that is gone, wrong, full or restarted: each is one clear error, or none at all."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import urllib3
from pydantic import SecretStr
from reverie_common.errors import (
    InvalidArgumentError,
    ReverieError,
    StoreAccessError,
    StoreFullError,
    StoreUnavailableError,
)
from reverie_common.settings import StoreSettings
from reverie_common.storage import ObjectStore, S3Store, open_store
from reverie_common.storage.s3_errors import Refusal, StoreAddress, error_from_refusal
from reverie_common.storage.seaweed import Seaweed

# A volume of 1 MB, and only one of them: full after the second megabyte.
TINY_DISK = ("-volume.max=1", "-master.volumeSizeLimitMB=1")
FULL_AFTER_OBJECTS = 20

OPERATIONS: dict[str, Callable[[ObjectStore], object]] = {
    "get": lambda store: store.get("a"),
    "create": lambda store: store.create("a", b"x"),
    "create large": lambda store: store.create("a", bytes(5_000_000)),
    "replace": lambda store: store.replace("a", b"x"),
    "head": lambda store: store.head("a"),
    "list": lambda store: list(store.list("")),
    "delete": lambda store: store.delete("a"),
    "check": lambda store: store.check(),
}


@pytest.fixture
def absent_store(free_port: Callable[[], int]) -> S3Store:
    """A store where nothing listens."""
    return S3Store(f"127.0.0.1:{free_port()}", "reverie", "key", "secret", retry_seconds=0.0)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_store_that_is_gone_is_named_with_the_remedy(absent_store: S3Store, operation: str) -> None:
    with pytest.raises(StoreUnavailableError) as caught:
        OPERATIONS[operation](absent_store)
    assert caught.value.reason == "STORE_UNAVAILABLE"
    assert caught.value.metadata["endpoint"] == absent_store.endpoint
    assert "REVERIE_STORE_ENDPOINT" in caught.value.message
    assert caught.value.retry_after_seconds


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("wrong", ["access key", "secret key"])
def test_wrong_credentials_are_named_with_the_remedy(seaweed: Seaweed, operation: str, wrong: str) -> None:
    access_key = "nobody" if wrong == "access key" else seaweed.access_key
    secret_key = "guess" if wrong == "secret key" else seaweed.secret_key
    store = S3Store(seaweed.endpoint, seaweed.bucket, access_key, secret_key, retry_seconds=60.0)
    with pytest.raises(StoreAccessError) as caught:
        OPERATIONS[operation](store)
    assert caught.value.reason == "STORE_ACCESS_DENIED"
    assert "REVERIE_STORE_ACCESS_KEY" in caught.value.message
    assert secret_key not in caught.value.message


def test_missing_credentials_are_asked_for() -> None:
    with pytest.raises(InvalidArgumentError, match="REVERIE_STORE_SECRET_KEY") as caught:
        open_store(StoreSettings(store_access_key=SecretStr("key")))
    assert caught.value.reason == "STORE_CREDENTIALS_MISSING"


def test_a_store_opens_as_its_settings_say(seaweed: Seaweed) -> None:
    settings = StoreSettings(
        store_endpoint=f"http://{seaweed.endpoint}",
        store_bucket=seaweed.bucket,
        store_access_key=SecretStr(seaweed.access_key),
        store_secret_key=SecretStr(seaweed.secret_key),
    )
    open_store(settings).check()


@pytest.mark.parametrize("endpoint", ["ftp://x", "http://", "http://x/path", ""])
def test_an_endpoint_that_cannot_be_one_is_refused(endpoint: str) -> None:
    with pytest.raises(InvalidArgumentError, match="REVERIE_STORE_ENDPOINT"):
        S3Store(endpoint, "reverie", "key", "secret")


def fill(store: S3Store) -> None:
    """Write a megabyte at a time, a bounded number of times."""
    for i in range(FULL_AFTER_OBJECTS):
        store.create(f"fill/{i}", bytes(1_000_000))


def test_a_store_that_fills_up_says_so_and_loses_nothing(tmp_path: Path) -> None:
    server = Seaweed(tmp_path / "tiny", extra_flags=TINY_DISK)
    server.start()
    try:
        store = server.open_store(retry_seconds=0.0)
        store.create("kept", b"precious")
        with pytest.raises(StoreFullError) as caught:
            fill(store)
        with pytest.raises(StoreFullError):
            store.replace("pointer", b"x")
        assert store.get("kept") == b"precious"
    finally:
        # It never ends by itself when it is full.
        server.stop(timeout_seconds=0.1)
    assert caught.value.reason == "STORE_FULL"
    assert "disk space" in caught.value.message
    assert caught.value.metadata["endpoint"] == server.endpoint
    assert caught.value.retry_after_seconds


def test_a_killed_store_that_comes_back_is_survived(tmp_path: Path) -> None:
    server = Seaweed(tmp_path / "restarted")
    server.start()
    store = server.open_store(retry_seconds=60.0)
    store.create("a", b"before")
    assert server.process is not None
    server.process.kill()
    server.process.wait()
    results: list[bytes] = []
    reader = threading.Thread(target=lambda: results.append(store.get("a")))
    reader.start()
    try:
        server.start()
        reader.join(timeout=60)
        created = store.create("b", b"after")
    finally:
        server.stop()
    assert results == [b"before"]
    assert created


def test_retrying_ends(free_port: Callable[[], int]) -> None:
    store = S3Store(f"127.0.0.1:{free_port()}", "reverie", "key", "secret", retry_seconds=0.3)
    with pytest.raises(StoreUnavailableError):
        store.get("a")


REFUSALS: list[tuple[Refusal, str]] = [
    (Refusal(status=507, code="XMinioStorageFull", message="Storage backend has reached its minimum"), "STORE_FULL"),
    (Refusal(status=500, code="InternalError", message="write: no space left on device"), "STORE_FULL"),
    (Refusal(status=503, code="SlowDown", message="Please reduce your request rate."), "STORE_UNAVAILABLE"),
    (Refusal(status=502, code="", message="<html>bad gateway</html>"), "STORE_UNAVAILABLE"),
    (Refusal(status=429, code="", message=""), "STORE_UNAVAILABLE"),
    (Refusal(status=403, code="RequestTimeTooSkewed", message=""), "STORE_ACCESS_DENIED"),
    (Refusal(status=400, code="ExpiredToken", message=""), "STORE_ACCESS_DENIED"),
    (Refusal(status=404, code="NoSuchBucket", message=""), "BUCKET_NOT_FOUND"),
    (Refusal(status=404, code="NoSuchKey", message=""), "OBJECT_NOT_FOUND"),
    (Refusal(status=400, code="EntityTooLarge", message=""), "STORE_REFUSED"),
]


@pytest.mark.parametrize(("refusal", "reason"), REFUSALS)
def test_answers_of_other_s3_servers_are_understood(refusal: Refusal, reason: str) -> None:
    error = error_from_refusal(refusal, StoreAddress(endpoint="s3.example.org", bucket="b"), "k")
    assert isinstance(error, ReverieError)
    assert error.reason == reason


def test_a_store_that_is_no_s3_server_is_an_error_of_ours(
    http_server: Callable[[int, bytes], str],
) -> None:
    store = S3Store(http_server(502, b"<html>bad gateway"), "reverie", "key", "secret", retry_seconds=0.0)
    for operation in ("get", "create", "replace", "head", "list", "delete", "check"):
        with pytest.raises(StoreUnavailableError):
            OPERATIONS[operation](store)


def test_nothing_is_left_open(seaweed: Seaweed, s3_store: S3Store) -> None:
    s3_store.create("a", bytes(100_000))
    for _ in range(100):
        with pytest.raises(InvalidArgumentError):
            s3_store.get("a", max_size_bytes=1)
    assert s3_store.get("a") == bytes(100_000)
    assert urllib3.request("GET", f"http://{seaweed.endpoint}/").status == 403
