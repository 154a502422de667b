"""Files to and from the store through presigned URLs, with the standard library.

Uploads create and never replace (`If-None-Match: *`); downloads are continued where they stopped, verified, and appear
under their name only when complete. Not here: where URLs come from.
"""

import asyncio
import hashlib
import http.client
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TypeVar
from urllib.parse import urlsplit

from reverie_common.errors import IntegrityError, StoreFullError

from reverie_client.errors import TransferError, UrlExpiredError

CHUNK_BYTES = 1 << 20
NUM_THREADS = 8
TIMEOUT_SECONDS = 60.0
RETRY_SECONDS = 60.0
MAX_DELAY_SECONDS = 5.0

# A store that has just started may refuse a write or two; one that goes on answering and refusing is full.
FULL_AFTER_SECONDS = 5.0

HTTP_PARTIAL = 206
HTTP_FORBIDDEN = 403
HTTP_EXISTS = (409, 412)
HTTP_RANGE_NOT_SATISFIABLE = 416


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a set of transfers is."""

    num_done: int
    num_total: int
    done_bytes: int
    total_bytes: int


OnProgress = Callable[[Progress], None]


def ignore_progress(_: Progress) -> None:
    """Do nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """One file to put at one URL."""

    url: str
    path: Path
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Download:
    """One file to read from one URL."""

    url: str
    path: Path
    size_bytes: int
    sha256: str


Transfer = TypeVar("Transfer", Upload, Download)


class _Stopped(Exception):  # noqa: N818 - not an error
    """The transfers were stopped from outside."""


class _TryAgain(Exception):  # noqa: N818 - not an error
    """This attempt failed in a way that may pass."""


class _WriteRefused(_TryAgain):
    """The store answered, and did not take the file."""


class Transfers:
    """A few threads that move files. Leaving the context stops them within one chunk."""

    def __init__(self, on_progress: OnProgress = ignore_progress, *, retry_seconds: float = RETRY_SECONDS) -> None:
        """Report to `on_progress` on the event loop's thread; repeat a failing transfer for `retry_seconds`."""
        self._retry_seconds = retry_seconds
        self._stop = threading.Event()
        self._executor = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="transfer")
        self._meter = _Meter(on_progress)

    async def __aenter__(self) -> Self:
        """Remember the loop that is reported to."""
        self._meter.loop = asyncio.get_running_loop()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop what is under way and wait for the threads."""
        self._stop.set()
        await asyncio.to_thread(self._executor.shutdown, cancel_futures=True)

    async def upload(self, files: Sequence[Upload]) -> None:
        """Put every file. Raises TransferError, UrlExpiredError, StoreFullError."""
        await self._move(files, self._upload)

    async def download(self, files: Sequence[Download]) -> None:
        """Read every file. Raises TransferError, UrlExpiredError, IntegrityError."""
        await self._move(files, self._download)

    async def _move(self, files: Sequence[Transfer], move: Callable[[Transfer], None]) -> None:
        self._meter.expect(files)
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._executor, self._patiently, move, file) for file in files))

    def _patiently(self, move: Callable[[Transfer], None], file: Transfer) -> None:
        """Repeat one transfer while what stops it may pass."""
        deadline = time.monotonic() + self._retry_seconds
        refused_since: float | None = None
        delay = 0.2
        while True:
            try:
                move(file)
            except (_TryAgain, OSError, http.client.HTTPException) as error:
                now = time.monotonic()
                refused_since = (refused_since or now) if isinstance(error, _WriteRefused) else None
                if refused_since is not None and now - refused_since > FULL_AFTER_SECONDS:
                    raise _full(file, error) from error
                if now + delay > deadline:
                    raise _given_up(file, self._retry_seconds, error) from error
                if self._stop.wait(delay):
                    raise _Stopped from error
                delay = min(delay * 2, MAX_DELAY_SECONDS)
            else:
                return

    def _upload(self, file: Upload) -> None:
        with file.path.open("rb") as body:
            headers = {
                "If-None-Match": "*",
                "Content-Length": str(file.size_bytes),
                "Content-Type": "application/octet-stream",
            }
            counted = _Counted(self._meter)
            try:
                with _request("PUT", file.url, headers, self._sent(body, counted)) as response:
                    response.read()
                    if response.status >= 500:
                        raise _WriteRefused(f"HTTP {response.status}")
                    if response.status not in HTTP_EXISTS:
                        _refuse(response)
            except BaseException:
                counted.take_back()
                raise
        self._meter.finish(file.size_bytes - counted.num_bytes)

    def _sent(self, body: BinaryIO, counted: "_Counted") -> Iterator[bytes]:
        while chunk := body.read(CHUNK_BYTES):
            if self._stop.is_set():
                raise _Stopped
            yield chunk
            counted.add(len(chunk))

    def _download(self, file: Download) -> None:
        if file.path.is_file() and sha256_of(file.path) == file.sha256:
            self._meter.finish(file.size_bytes)
            return
        file.path.parent.mkdir(parents=True, exist_ok=True)
        part = file.path.with_name(file.path.name + ".part")
        counted = _Counted(self._meter)
        try:
            self._fill(file, part, counted)
            if sha256_of(part) != file.sha256:
                part.unlink()
                raise IntegrityError(
                    f"{file.path.name} does not have the sha256 {file.sha256} that it was stored with; it was damaged "
                    "on its way or in the store; repeat the command"
                )
        except BaseException:
            counted.take_back()
            raise
        part.replace(file.path)
        self._meter.finish(file.size_bytes - counted.num_bytes)

    def _fill(self, file: Download, part: Path, counted: "_Counted") -> None:
        """Bring the partial file to its full size, from where it is."""
        have = part.stat().st_size if part.is_file() else 0
        if have == file.size_bytes and have:
            return
        headers = {"Range": f"bytes={have}-"} if 0 < have < file.size_bytes else {}
        with _request("GET", file.url, headers, None) as response:
            _refuse(response)
            is_continued = response.status == HTTP_PARTIAL
            counted.add(have if is_continued else 0)
            with part.open("ab" if is_continued else "wb") as out:
                while chunk := response.read(CHUNK_BYTES):
                    if self._stop.is_set():
                        raise _Stopped
                    out.write(chunk)
                    counted.add(len(chunk))
        if part.stat().st_size != file.size_bytes:
            raise _TryAgain(f"the connection ended after {part.stat().st_size} of {file.size_bytes} bytes")


class _Meter:
    """Adds up what all threads do and reports it on the event loop."""

    def __init__(self, on_progress: OnProgress) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._num_done = self._num_total = self._done_bytes = self._total_bytes = 0

    def expect(self, files: Iterable[Upload | Download]) -> None:
        for file in files:
            self._num_total += 1
            self._total_bytes += file.size_bytes
        self.move(0)

    def finish(self, missing_bytes: int) -> None:
        self.move(missing_bytes, num_done=1)

    def move(self, num_bytes: int, *, num_done: int = 0) -> None:
        with self._lock:
            self._done_bytes += num_bytes
            self._num_done += num_done
            progress = Progress(
                num_done=self._num_done,
                num_total=self._num_total,
                done_bytes=self._done_bytes,
                total_bytes=self._total_bytes,
            )
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._on_progress, progress)


class _Counted:
    """The bytes of one attempt, which a failed attempt gives back."""

    def __init__(self, meter: _Meter) -> None:
        self._meter = meter
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._meter.move(num_bytes)

    def take_back(self) -> None:
        self._meter.move(-self.num_bytes)


def _full(file: Upload | Download, error: Exception) -> StoreFullError:
    host = urlsplit(file.url).netloc
    return StoreFullError(
        f"{file.path.name} could not be stored: the store at {host} answers, but takes no more objects ({error}): "
        "it is full, or its disk is; free or add disk space, and repeat the command: what is done is kept",
        metadata={"file": file.path.name, "endpoint": host},
    )


def _given_up(file: Upload | Download, seconds: float, error: Exception) -> TransferError:
    host = urlsplit(file.url).netloc
    return TransferError(
        f"{file.path.name} could not be moved between here and the store at {host} within {seconds:.0f} s: {error}; "
        "check that the store runs, and repeat the command: what is done is kept",
        metadata={"file": file.path.name, "endpoint": host},
    )


def sha256_of(path: Path) -> str:
    """Return the lower-case hex sha256 of a file's bytes."""
    with path.open("rb") as body:
        return hashlib.file_digest(body, "sha256").hexdigest()


@contextmanager
def _request(
    method: str, url: str, headers: dict[str, str], body: Iterator[bytes] | None
) -> Iterator[http.client.HTTPResponse]:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise TransferError(f"{parts.scheme}://{parts.netloc} is not a place to move files to or from by HTTP")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request(method, f"{parts.path}?{parts.query}", body=body, headers=headers)
        yield connection.getresponse()
    finally:
        connection.close()


def _refuse(response: http.client.HTTPResponse) -> None:
    """Raise for an answer that is not a success: what may pass, what needs a new URL, and what will not do."""
    if response.status < 300:
        return
    text = response.read(500).decode("utf-8", "replace")
    if response.status == HTTP_FORBIDDEN:
        raise UrlExpiredError(f"the store refused a presigned URL (403): {text}")
    if response.status in (HTTP_RANGE_NOT_SATISFIABLE, 408, 429) or response.status >= 500:
        raise _TryAgain(f"the store answered {response.status}: {text}")
    raise TransferError(f"the store answered {response.status}: {text}")
