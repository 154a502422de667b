"""ImportSamples: other buckets of the store and the web, and what keeps the trainer from being led astray."""

import hashlib
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from reverie.training.v1 import job_pb2, training_pb2
from reverie_common.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, PermissionDeniedError
from reverie_common.rpc.channel import translated
from reverie_common.storage import S3Store
from reverie_common.storage.keys import image_key
from reverie_trainer.jobs.catalog.downloads import DownloadError, DownloadLimits, download

Answer = tuple[int, dict[str, str], bytes]


class Web:
    """A web server on this machine that answers as it is told."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append(f"{self.headers['Host']}{self.path}")
                status, headers, body = web.answers.get(self.path, (404, {}, b""))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if context is not None:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port
        self.host = f"127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def url(self, path: str, scheme: str = "http") -> str:
        return f"{scheme}://{self.host}{path}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def web() -> Iterator[Web]:
    """A web server."""
    server = Web()
    yield server
    server.close()


@pytest.fixture
def photos(module_s3_store: S3Store) -> S3Store:
    """Another bucket of the store's server, with pictures, captions and something else."""
    bucket = module_s3_store.sibling(f"{module_s3_store.bucket[:50]}-photos")
    bucket.make_bucket()
    contents = {
        "cats/a_red.png": b"512x512 a",
        "cats/a_red.txt": "a red cat\n\nun chat \u00e9tonn\u00e9\n".encode(),
        "cats/old/b.JPG": b"640x448 b",
        "cats/notes.md": b"no picture",
        "cats/empty.png": b"",
        "cats/latin.png": b"512x512 l",
        "cats/latin.txt": "\u00e9".encode("latin-1"),
        "dogs/d.png": b"512x512 d",
    }
    for key, body in contents.items():
        bucket.replace(key, body)
    return bucket


def bucket_source(bucket: str, prefix: str = "cats/", **changes: str) -> dict[str, Any]:
    return {"bucket": training_pb2.BucketSource(bucket=bucket, prefix=prefix, **changes)}


def url_source(*urls: str, **changes: Any) -> dict[str, Any]:
    return {"urls": training_pb2.UrlSource(images=[training_pb2.UrlImage(url=url, **changes) for url in urls])}


async def import_samples(trainer: Any, name: str, **fields: Any) -> list[training_pb2.ImportSamplesResponse]:
    request = training_pb2.ImportSamplesRequest(dataset=name, **fields)
    with translated():
        return [response async for response in trainer.datasets.ImportSamples(request, timeout=60)]


def rejected(responses: list[training_pb2.ImportSamplesResponse]) -> dict[str, str]:
    return {item.sample: item.message for response in responses for item in response.rejected}


@pytest.fixture
def limits(web: Web) -> Callable[..., DownloadLimits]:
    """Limits that allow the web server."""

    def make(*hosts: str, **changes: Any) -> DownloadLimits:
        return DownloadLimits(hosts=hosts or (web.host,), **{"max_bytes": 1000, **changes})

    return make


async def test_images_of_a_bucket_are_added_where_they_are(
    start_trainer: Any, make_spec: Any, photos: S3Store, neighbours: Any
) -> None:
    trainer = await start_trainer(source_buckets=(photos.bucket,))
    await trainer.add_dataset("from-bucket", [])
    responses = await import_samples(trainer, "from-bucket", **bucket_source(photos.bucket))
    assert responses[-1].dataset.num_samples == 2
    assert [responses[0].num_done, responses[-1].num_done, responses[-1].num_total] == [0, 4, 4]
    assert "0 bytes" in rejected(responses)["empty.png"]
    assert "not UTF-8" in rejected(responses)["latin.png"]
    spec = make_spec("from-bucket")
    spec.datasets[0].instance_prompt = "a cat"
    job = await trainer.finish((await trainer.submit(spec)).job_id)
    assert job.state == job_pb2.TRAINING_JOB_STATE_SUCCEEDED
    planned = {plan.image.uri: plan.image.sha256 for plan in neighbours.vae.plans}
    assert planned == {
        photos.uri("cats/a_red.png"): hashlib.sha256(b"512x512 a").hexdigest(),
        photos.uri("cats/old/b.JPG"): hashlib.sha256(b"640x448 b").hexdigest(),
    }
    assert trainer.store.head(image_key(hashlib.sha256(b"512x512 a").hexdigest())) is None
    assert {"a red cat", "un chat \u00e9tonn\u00e9", "a cat"} <= set(neighbours.encoder.encoded)


async def test_captions_may_be_the_names_of_the_objects(
    start_trainer: Any, make_spec: Any, photos: S3Store, neighbours: Any
) -> None:
    trainer = await start_trainer(source_buckets=(photos.bucket,))
    await trainer.add_dataset("named", [])
    await import_samples(trainer, "named", **bucket_source(photos.bucket, caption_strategy="filename"))
    await trainer.finish((await trainer.submit(make_spec("named"))).job_id)
    assert sorted(set(neighbours.encoder.encoded)) == ["", "a red", "b", "latin"]


async def test_a_bucket_that_is_not_listed_is_refused(trainer: Any, photos: S3Store) -> None:
    await trainer.add_dataset("foreign", [])
    with pytest.raises(PermissionDeniedError, match=r"--source-buckets") as caught:
        await import_samples(trainer, "foreign", **bucket_source(photos.bucket))
    assert caught.value.reason == "SOURCE_NOT_ALLOWED"


async def test_a_prefix_without_images_is_told_in_the_words_that_guides_use(
    start_trainer: Any, photos: S3Store
) -> None:
    trainer = await start_trainer(source_buckets=(photos.bucket,))
    await trainer.add_dataset("nothing", [])
    with pytest.raises(FailedPreconditionError, match="no images detected in dataset 'nothing'"):
        await import_samples(trainer, "nothing", **bucket_source(photos.bucket, "birds/"))


async def test_a_repeated_request_adds_nothing_more(start_trainer: Any, photos: S3Store) -> None:
    trainer = await start_trainer(source_buckets=(photos.bucket,))
    await trainer.add_dataset("twice", [])
    await import_samples(trainer, "twice", request_id="once", **bucket_source(photos.bucket))
    photos.replace("cats/late.png", b"512x512 late")
    responses = await import_samples(trainer, "twice", request_id="once", **bucket_source(photos.bucket))
    photos.delete("cats/late.png")
    assert [response.dataset.num_samples for response in responses] == [2]


async def test_images_of_the_web_are_copied_into_the_store(
    start_trainer: Any, make_spec: Any, web: Web, neighbours: Any
) -> None:
    web.answers = {"/a%20b.png?v=1": (200, {}, b"512x512 w"), "/c.png": (500, {}, b"")}
    trainer = await start_trainer(source_hosts=(web.host,))
    await trainer.add_dataset("web", [])
    source = url_source(web.url("/a%20b.png?v=1"), web.url("/c.png"), captions=["a cat"])
    responses = await import_samples(trainer, "web", **source)
    assert responses[-1].dataset.num_samples == 1
    assert rejected(responses) == {"c.png": "127.0.0.1 answered 500; check the URL"}
    digest = hashlib.sha256(b"512x512 w").hexdigest()
    assert trainer.store.get(image_key(digest)) == b"512x512 w"
    job = await trainer.finish((await trainer.submit(make_spec("web"))).job_id)
    assert job.preparation.num_images == 1


async def test_a_wrong_list_is_refused_with_every_field(trainer: Any) -> None:
    await trainer.add_dataset("list", [])
    with pytest.raises(InvalidArgumentError) as caught:
        await import_samples(trainer, "list", **url_source("https://a.example/x.png", "https://b.example/x.png"))
    assert [violation.field for violation in caught.value.violations] == ["urls.images[1].name"]
    with pytest.raises(InvalidArgumentError, match="give bucket or urls"):
        await import_samples(trainer, "list")
    with pytest.raises(NotFoundError):
        await import_samples(trainer, "nowhere", **url_source("https://a.example/x.png"))


def test_a_file_is_read_whole(web: Web, limits: Any) -> None:
    web.answers["/a.png"] = (200, {}, b"x" * 1000)
    assert download(web.url("/a.png"), limits()) == b"x" * 1000
    assert web.asked == [f"{web.host}/a.png"]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://other.example/a.png", "not one that the trainer may read from"),
        ("ftp://{host}/a.png", "no https URL"),
        ("http://user:secret@{host}/a.png", "no https URL without a user name"),
        ("file:///etc/passwd", "no https URL"),
        ("http://127.0.0.1:1/a.png", "not one that the trainer may read from"),
        ("https://[::1/a.png", "is no URL"),
    ],
)
def test_what_is_not_listed_is_not_asked(web: Web, limits: Any, url: str, told: str) -> None:
    with pytest.raises(DownloadError, match=told) as caught:
        download(url.format(host=web.host), limits())
    assert "secret" not in str(caught.value) or "user name" in str(caught.value)
    assert web.asked == []


def test_a_listed_name_with_a_private_address_is_refused_unless_the_address_is_listed(web: Web, limits: Any) -> None:
    web.answers["/a.png"] = (200, {}, b"body")
    url = f"http://localhost:{web.port}/a.png"
    with pytest.raises(DownloadError, match="private address"):
        download(url, limits(f"localhost:{web.port}"))
    assert web.asked == []
    both = (f"localhost:{web.port}", web.host, f"[::1]:{web.port}")
    assert download(url, limits(*both)) == b"body"


def test_plain_http_is_refused_outside_of_this_machine(limits: Any) -> None:
    with pytest.raises(DownloadError, match="http is only for this machine"):
        download("http://192.0.2.7/a.png", limits("192.0.2.7"))


def test_redirections_are_checked_like_urls(web: Web, limits: Any) -> None:
    web.answers = {
        "/here": (302, {"Location": "/there"}, b""),
        "/there": (200, {}, b"body"),
        "/away": (302, {"Location": "https://other.example/a.png"}, b""),
        "/round": (302, {"Location": "/round"}, b""),
    }
    assert download(web.url("/here"), limits()) == b"body"
    with pytest.raises(DownloadError, match=r"other.example at port 443 is not one"):
        download(web.url("/away"), limits())
    with pytest.raises(DownloadError, match="more than 5 redirections"):
        download(web.url("/round"), limits())


def test_a_large_file_is_refused_by_what_it_says_and_by_what_it_is(web: Web, limits: Any) -> None:
    web.answers = {
        "/said": (200, {}, b"x" * 1001),
        "/unsaid": (200, {"Content-Length": "1000", "Transfer-Encoding": "identity"}, b"x" * 1001),
    }
    with pytest.raises(DownloadError, match="has 1001 bytes, the limit is 1000"):
        download(web.url("/said"), limits())
    assert len(download(web.url("/unsaid"), limits())) == 1000


def test_a_slow_server_is_given_up(web: Web, limits: Any) -> None:
    web.answers["/a.png"] = (200, {}, b"body")
    with pytest.raises(DownloadError, match="not there within 0 s"):
        download(web.url("/a.png"), limits(total_seconds=0.0))


def test_a_certificate_of_nobody_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "server.pem").write_text(CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    server = Web(context)
    hosts = (f"localhost:{server.port}", server.host, f"[::1]:{server.port}")
    with pytest.raises(DownloadError, match="certificate"):
        download(f"https://localhost:{server.port}/a.png", DownloadLimits(hosts=hosts, max_bytes=1000))
    server.close()
    assert server.asked == []


def test_a_certificate_must_be_that_of_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "server.pem").write_text(CERTIFICATE)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "server.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    server = Web(context)
    server.answers["/a.png"] = (200, {}, b"body")
    hosts = (f"localhost:{server.port}", server.host, f"[::1]:{server.port}")
    limits = DownloadLimits(hosts=hosts, max_bytes=1000)
    assert download(f"https://localhost:{server.port}/a.png", limits) == b"body"
    with pytest.raises(DownloadError, match="doesn't match 'localhost'"):
        download(server.url("/a.png", "https"), limits)
    server.close()
    assert server.asked == [f"localhost:{server.port}/a.png"]


# Made with `openssl req -x509`, for localhost and for these tests alone.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQglRLJ30a7HbgMDVA9
w1ntz5N1iSCaQnf1RvvcLPfmwEyhRANCAATzJX3w75MajO97TtVb1KrhQ2nTARSy
M36HdwybAmw11bACzfv5RSQyGMJW2kpl7CrkW/Q46F6dv814dBFAWTmT
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBljCCATugAwIBAgIUEYwoJtOzEVk8ejXeVqFHZJS/lcUwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMzIzNDAyM1oYDzIxMjYxMDMw
MjM0MDIzWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATzJX3w75MajO97TtVb1KrhQ2nTARSyM36HdwybAmw11bACzfv5RSQy
GMJW2kpl7CrkW/Q46F6dv814dBFAWTmTo2kwZzAdBgNVHQ4EFgQUeuXs3gBpr7hV
ktCIlwYopsUP/9YwHwYDVR0jBBgwFoAUeuXs3gBpr7hVktCIlwYopsUP/9YwDwYD
VR0TAQH/BAUwAwEB/zAUBgNVHREEDTALgglsb2NhbGhvc3QwCgYIKoZIzj0EAwID
SQAwRgIhAIutRZBO6DJaLvTNv6LRLodmCzSVkjH5IFMfo4zyVmWfAiEAqj1L+Bji
hdMQpiuS5Sq2eiyejLCkrkPyhqI4NhFHHlM=
-----END CERTIFICATE-----
"""
