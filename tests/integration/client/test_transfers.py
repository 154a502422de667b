"""Files go to and from a real store, and survive what networks do."""

import hashlib
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import pytest
from reverie_client.errors import TransferError, UrlExpiredError
from reverie_client.transfer import Download, Progress, Transfers, Upload
from reverie_common.errors import IntegrityError
from reverie_common.storage import S3Store

EXPIRES = timedelta(minutes=5)
BODY = bytes(range(256)) * 20_000


class Flaky(Protocol):
    """What conftest's FlakyServer offers."""

    body: bytes
    statuses: list[int]
    cut_after: list[int]
    ranges: list[str | None]
    stored: bytes
    url: str


def download_of(url: str, path: Path, body: bytes = BODY) -> Download:
    return Download(url=url, path=path, size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest())


def upload_of(url: str, path: Path) -> Upload:
    return Upload(url=url, path=path, size_bytes=path.stat().st_size)


async def test_files_come_back_as_they_went(s3_store: S3Store, tmp_path: Path) -> None:
    seen: list[Progress] = []
    uploads = []
    for number in range(12):
        path = tmp_path / f"{number}"
        path.write_bytes(BODY[: number * 1000])
        uploads.append(upload_of(s3_store.presign_put(f"k/{number}", expires=EXPIRES), path))
    async with Transfers(seen.append) as transfers:
        await transfers.upload(uploads)
    assert seen[-1] == Progress(num_done=12, num_total=12, done_bytes=66_000, total_bytes=66_000)

    downloads = [
        download_of(
            s3_store.presign_get(f"k/{number}", expires=EXPIRES), tmp_path / "out" / f"{number}", BODY[: number * 1000]
        )
        for number in range(12)
    ]
    async with Transfers() as transfers:
        await transfers.download(downloads)
    assert [download.path.read_bytes() for download in downloads] == [BODY[: n * 1000] for n in range(12)]
    assert not list((tmp_path / "out").glob("*.part"))


async def test_an_upload_never_replaces_what_is_there(s3_store: S3Store, tmp_path: Path) -> None:
    s3_store.create("k", b"first")
    path = tmp_path / "second"
    path.write_bytes(b"second")
    async with Transfers() as transfers:
        await transfers.upload([upload_of(s3_store.presign_put("k", expires=EXPIRES), path)])
    assert s3_store.get("k") == b"first"


async def test_half_a_download_is_continued(flaky: Flaky, tmp_path: Path) -> None:
    flaky.body = BODY
    flaky.cut_after = [1_000_000]
    async with Transfers() as transfers:
        await transfers.download([download_of(flaky.url, tmp_path / "file")])
    assert (tmp_path / "file").read_bytes() == BODY
    assert flaky.ranges == [None, "bytes=1000000-"]


async def test_what_an_interrupted_run_left_is_continued(flaky: Flaky, tmp_path: Path) -> None:
    flaky.body = BODY
    (tmp_path / "file.part").write_bytes(BODY[:3000])
    async with Transfers() as transfers:
        await transfers.download([download_of(flaky.url, tmp_path / "file")])
    assert flaky.ranges == ["bytes=3000-"]
    assert (tmp_path / "file").read_bytes() == BODY


async def test_a_file_that_is_there_is_not_fetched_again(flaky: Flaky, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(BODY)
    async with Transfers() as transfers:
        await transfers.download([download_of(flaky.url, tmp_path / "file")])
    assert flaky.ranges == []


async def test_errors_that_pass_are_survived(flaky: Flaky, tmp_path: Path) -> None:
    flaky.body = BODY
    flaky.statuses = [503, 500]
    async with Transfers() as transfers:
        await transfers.download([download_of(flaky.url, tmp_path / "file")])
    path = tmp_path / "file"
    flaky.statuses = [503]
    async with Transfers() as transfers:
        await transfers.upload([upload_of(flaky.url, path)])
    assert flaky.stored == BODY


async def test_damaged_bytes_never_get_the_name(flaky: Flaky, tmp_path: Path) -> None:
    flaky.body = BODY[:-1] + b"?"
    with pytest.raises(IntegrityError, match="sha256"):
        async with Transfers() as transfers:
            await transfers.download([download_of(flaky.url, tmp_path / "file")])
    assert not (tmp_path / "file").exists()


async def test_an_expired_url_is_told_apart(flaky: Flaky, tmp_path: Path) -> None:
    flaky.statuses = [403]
    with pytest.raises(UrlExpiredError):
        async with Transfers() as transfers:
            await transfers.download([download_of(flaky.url, tmp_path / "file")])


async def test_an_unreachable_store_is_named_with_what_to_do(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/file?x"
    with pytest.raises(TransferError, match=r"127\.0\.0\.1:9 .* repeat the command"):
        async with Transfers(retry_seconds=0.3) as transfers:
            await transfers.download([download_of(url, tmp_path / "file")])
