"""Every ObjectStore keeps the same promises: the S3 one on a real server, and the one in memory."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import urllib3
from reverie_common.errors import IntegrityError, InvalidArgumentError, NotFoundError, ObjectNotFoundError
from reverie_common.storage import MemoryStore, ObjectInfo, ObjectStore, S3Store, keys
from reverie_common.storage.s3 import LIST_PAGE_KEYS
from reverie_common.storage.seaweed import Seaweed


@pytest.fixture(params=["s3", "memory"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    """An empty store of either kind."""
    found: ObjectStore = request.getfixturevalue(f"{request.param}_store")
    return found


def test_reads_what_was_created(store: ObjectStore) -> None:
    assert store.create("a/b", b"hello")
    assert store.get("a/b") == b"hello"


def test_creating_never_overwrites(store: ObjectStore) -> None:
    assert store.create("a", b"first")
    assert not store.create("a", b"second")
    assert store.get("a") == b"first"


def test_creating_never_overwrites_large_objects(store: ObjectStore) -> None:
    body = bytes(5 * 1024 * 1024)
    assert store.create("a", body)
    assert not store.create("a", b"\x01" * len(body))
    assert store.get("a") == body


def test_a_sibling_is_another_bucket(store: ObjectStore) -> None:
    sibling = store.sibling(f"{store.bucket[:50]}-other")
    if isinstance(sibling, S3Store):
        sibling.make_bucket()
    sibling.create("a", b"there")
    assert store.head("a") is None
    assert store.sibling(sibling.bucket).get("a") == b"there"
    assert sibling.uri("a") == f"s3://{sibling.bucket}/a"


def test_replacing_overwrites(store: ObjectStore) -> None:
    store.replace("a", b"first")
    store.replace("a", b"second")
    assert store.get("a") == b"second"


def test_copies_an_object_and_keeps_its_source(store: ObjectStore) -> None:
    body = bytes(range(256)) * 1000
    store.create("a/source", body)
    store.create("b/target", b"older")
    store.copy("a/source", "b/target")
    assert store.get("b/target", sha256=hashlib.sha256(body).hexdigest()) == body == store.get("a/source")


def test_a_copy_of_nothing_names_the_source(store: ObjectStore) -> None:
    with pytest.raises(ObjectNotFoundError, match="nowhere"):
        store.copy("nowhere", "target")
    assert store.head("target") is None


@pytest.mark.parametrize("body", [b"", b"x", bytearray(b"buffer"), memoryview(b"_view_")[1:5]])
def test_takes_bodies_of_every_kind(store: ObjectStore, body: bytes | bytearray | memoryview) -> None:
    assert store.create("created", body)
    store.replace("replaced", body)
    assert store.get("created") == store.get("replaced") == bytes(body)


def test_one_of_many_creators_wins(store: ObjectStore) -> None:
    bodies = [f"writer {i}".encode() for i in range(12)]
    barrier = threading.Barrier(len(bodies))

    def create(body: bytes) -> bool:
        barrier.wait(timeout=30)
        return store.create("contested", body)

    with ThreadPoolExecutor(len(bodies)) as pool:
        created = list(pool.map(create, bodies))

    assert sum(created) == 1
    assert store.get("contested") == bodies[created.index(True)]


def test_a_missing_object_is_named(store: ObjectStore) -> None:
    with pytest.raises(ObjectNotFoundError) as caught:
        store.get("no/such")
    assert caught.value.reason == "OBJECT_NOT_FOUND"
    assert caught.value.metadata["key"] == "no/such"


def test_a_digest_that_fits_is_taken(store: ObjectStore) -> None:
    store.create("a", b"hello")
    assert store.get("a", sha256=hashlib.sha256(b"hello").hexdigest()) == b"hello"


def test_a_digest_that_does_not_fit_is_refused(store: ObjectStore) -> None:
    store.create("a", b"hello")
    with pytest.raises(IntegrityError) as caught:
        store.get("a", sha256=hashlib.sha256(b"other").hexdigest())
    assert caught.value.reason == "OBJECT_CORRUPT"
    assert caught.value.metadata["sha256"] == hashlib.sha256(b"hello").hexdigest()


def test_an_object_above_the_readers_limit_is_refused(store: ObjectStore) -> None:
    store.create("a", b"hello")
    assert store.get("a", max_size_bytes=5) == b"hello"
    with pytest.raises(InvalidArgumentError) as caught:
        store.get("a", max_size_bytes=4)
    assert caught.value.reason == "OBJECT_TOO_LARGE"


def test_head_tells_the_size(store: ObjectStore) -> None:
    store.create("a", b"hello")
    assert store.head("a") == ObjectInfo(key="a", size_bytes=5)
    assert store.head("b") is None


def test_lists_by_prefix_in_order(store: ObjectStore) -> None:
    for key in ("b/2", "a/1", "b/1/x", "c", "bb"):
        store.create(key, key.encode())
    assert [info.key for info in store.list("b/")] == ["b/1/x", "b/2"]
    assert [(info.key, info.size_bytes) for info in store.list("c")] == [("c", 1)]
    assert list(store.list("nothing/")) == []


def test_lists_more_than_one_page(store: ObjectStore) -> None:
    names = [f"page/{i:05d}" for i in range(LIST_PAGE_KEYS + 7)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.create(name, b"x"), names))
    assert [info.key for info in store.list("page/")] == names


def test_deleting_may_be_repeated(store: ObjectStore) -> None:
    store.create("a", b"hello")
    store.delete("a")
    store.delete("a")
    assert store.head("a") is None
    assert store.create("a", b"again")


def test_uris_name_objects(store: ObjectStore) -> None:
    uri = store.uri("a/b")
    assert uri == f"s3://{store.bucket}/a/b"
    assert store.key_of(uri) == "a/b"


@pytest.mark.parametrize("uri", ["s3://other/a", "http://x/a", "a", "", "s3://"])
def test_uris_of_other_stores_are_refused(store: ObjectStore, uri: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        store.key_of(uri)
    assert caught.value.reason == "FOREIGN_URI"


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/./b", "x" * 1025])
def test_keys_that_stores_disagree_about_are_refused(store: ObjectStore, key: str) -> None:
    for operation in (store.get, store.head, store.delete, store.uri):
        with pytest.raises(InvalidArgumentError) as caught:
            operation(key)
        assert caught.value.reason == "INVALID_OBJECT_KEY"


@pytest.mark.parametrize("key", ["sp ace", "pl+us", "per%20cent", "caf\u00e9", "a=b&c?d#e", "v1/text/f/ab/abc.ref"])
def test_keys_may_have_any_character(store: ObjectStore, key: str) -> None:
    assert store.create(key, b"x")
    assert not store.create(key, b"y")
    assert store.get(key) == b"x"
    assert [info.key for info in store.list("")] == [key]


def test_a_store_that_is_there_passes_its_check(store: ObjectStore) -> None:
    store.check()


def test_presigned_urls_read_and_write_without_credentials(s3_store: S3Store) -> None:
    body = b"uploaded"
    put = urllib3.request("PUT", s3_store.presign_put("up", expires=timedelta(minutes=1)), body=body)
    got = urllib3.request("GET", s3_store.presign_get("up", expires=timedelta(minutes=1)))
    assert (put.status, got.status, got.data) == (200, 200, body)


def test_a_presigned_url_is_for_one_object_only(s3_store: S3Store) -> None:
    s3_store.create("mine", b"x")
    s3_store.create("other", b"y")
    url = s3_store.presign_get("mine", expires=timedelta(minutes=1)).replace("/mine?", "/other?")
    assert urllib3.request("GET", url).status == 403


def test_presigned_urls_carry_the_public_endpoint(seaweed: Seaweed, s3_store: S3Store) -> None:
    store = S3Store(
        seaweed.endpoint,
        s3_store.bucket,
        seaweed.access_key,
        seaweed.secret_key,
        public_endpoint="https://pictures.example.org",
    )
    url = store.presign_get("a", expires=timedelta(minutes=1))
    assert url.startswith(f"https://pictures.example.org/{s3_store.bucket}/a?")


def test_memory_urls_are_not_for_the_network(memory_store: MemoryStore) -> None:
    assert memory_store.presign_get("a", expires=timedelta(minutes=1)) == "memory://memory/a"
    assert memory_store.presign_put("a", expires=timedelta(minutes=1)) == "memory://memory/a"


def test_anonymous_reads_are_refused(s3_store: S3Store) -> None:
    s3_store.create("a", b"x")
    assert urllib3.request("GET", f"http://{s3_store.endpoint}/{s3_store.bucket}/a").status == 403


def test_making_a_bucket_may_be_repeated(s3_store: S3Store) -> None:
    s3_store.make_bucket()
    s3_store.check()


def test_a_missing_bucket_is_named(seaweed: Seaweed) -> None:
    store = S3Store(seaweed.endpoint, "no-such-bucket", seaweed.access_key, seaweed.secret_key, retry_seconds=0)
    requests: list[Callable[[], object]] = [
        store.check,
        lambda: store.get("a"),
        lambda: store.create("a", b""),
        lambda: store.replace("a", b""),
        lambda: list(store.list("")),
    ]
    for request in requests:
        with pytest.raises(NotFoundError) as caught:
            request()
        assert caught.value.reason == "BUCKET_NOT_FOUND"
        assert caught.value.metadata["bucket"] == "no-such-bucket"
        assert "REVERIE_STORE_BUCKET" in caught.value.message


def test_a_checkpoints_parts_and_manifest_are_listed_together(store: ObjectStore) -> None:
    part = keys.checkpoint_part_key("j1", 20, "state", "ab" * 32)
    manifest = keys.checkpoint_manifest_key("j1", 20)
    store.create(part, b"part")
    store.create(manifest, b"{}")
    assert {info.key for info in store.list(keys.checkpoint_prefix("j1"))} == {part, manifest}
