"""Adding images where they are: from other buckets of the store's server, and from the web (ImportSamples).

An image in another bucket stays there; it is read once, for its digest, which names it from then on. An image from the
web is copied into the store. What cannot be read is told by name and left out.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from reverie.common.v1 import common_pb2
from reverie.training.v1 import job_pb2, training_pb2
from reverie_common.concurrency import as_ready
from reverie_common.errors import (
    FailedPreconditionError,
    FieldViolation,
    InvalidArgumentError,
    PermissionDeniedError,
    StoreUnavailableError,
)
from reverie_common.storage import ObjectInfo, ObjectStore, put_object
from reverie_common.storage.keys import image_key

from reverie_trainer.jobs.api.requests import digest_of
from reverie_trainer.jobs.catalog.datasets import (
    MAX_CAPTIONS,
    MAX_FILE_BYTES,
    MAX_SAMPLES,
    Datasets,
    MutationId,
    refuse,
)
from reverie_trainer.jobs.catalog.downloads import DownloadError, DownloadLimits, download
from reverie_trainer.jobs.catalog.manifests import Sample
from reverie_trainer.jobs.checks.rules import MAX_PROMPT_CHARACTERS, one_of, violation

MAX_URLS = 10_000
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
CAPTION_STRATEGIES = ("textfile", "filename")

_PARALLEL = 4
_MAX_CAPTION_FILE_BYTES = 1 << 20
_PROGRESS_SECONDS = 0.25
_MAX_NAMED = 10


class _UnreadableError(Exception):
    """One image cannot be imported; the others can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item:
    """One image to import."""

    name: str
    read: Callable[[], Sample]
    """Blocks; raises _UnreadableError."""


@dataclass(kw_only=True, slots=True)
class _Outcome:
    """What was read so far."""

    samples: list[Sample] = field(default_factory=list)
    untold: list[job_pb2.RejectedSample] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    num_done: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Importer:
    """Imports images on behalf of callers, from where this trainer may read."""

    datasets: Datasets
    store: ObjectStore
    source_buckets: Sequence[str] = ()
    source_hosts: Sequence[str] = ()

    async def run(
        self, request: training_pb2.ImportSamplesRequest
    ) -> AsyncIterator[training_pb2.ImportSamplesResponse]:
        """Read every image, tell of the progress, add what could be read; the last response has the dataset.

        Raises:
            InvalidArgumentError: with everything that is wrong with the request.
            NotFoundError: there is no such dataset or bucket.
            PermissionDeniedError: the bucket is not one that this trainer may read.
            FailedPreconditionError: there is no image, or none that can be read.
        """
        mutation = MutationId(method="ImportSamples", request_id=request.request_id, digest=digest_of(request))
        repeated = await self.datasets.repeated(mutation)
        if repeated is not None:
            yield training_pb2.ImportSamplesResponse(dataset=repeated)
            return
        await self.datasets.get(request.dataset)
        items = await self._items(request)
        outcome = _Outcome()
        async for response in self._read_all(request.dataset, items, outcome):
            yield response
        if not outcome.samples:
            reasons = "; ".join(sorted(outcome.reasons)[:_MAX_NAMED])
            raise _nothing(f"all {len(items)} images were rejected; {reasons}", request.dataset)
        added = await self.datasets.add(request.dataset, mutation, sorted(outcome.samples, key=lambda item: item.name))
        yield training_pb2.ImportSamplesResponse(num_done=len(items), num_total=len(items), dataset=added.dataset)

    async def _read_all(
        self, dataset: str, items: Sequence[_Item], outcome: _Outcome
    ) -> AsyncIterator[training_pb2.ImportSamplesResponse]:
        def progress() -> training_pb2.ImportSamplesResponse:
            rejected, outcome.untold = outcome.untold, []
            return training_pb2.ImportSamplesResponse(
                num_done=outcome.num_done, num_total=len(items), rejected=rejected
            )

        yield progress()
        told_at = time.monotonic()
        async for item, result in as_ready(items, _read, max_in_flight=_PARALLEL):
            outcome.num_done += 1
            if isinstance(result, Sample):
                outcome.samples.append(result)
            else:
                outcome.untold.append(job_pb2.RejectedSample(dataset=dataset, sample=item.name, message=result))
                outcome.reasons.append(f"{item.name}: {result}")
            if outcome.num_done == len(items) or time.monotonic() - told_at >= _PROGRESS_SECONDS:
                told_at = time.monotonic()
                yield progress()

    async def _items(self, request: training_pb2.ImportSamplesRequest) -> list[_Item]:
        kind = request.WhichOneof("source")
        if kind == "bucket":
            return await self._bucket_items(request.bucket, request.dataset)
        refuse([*_check_urls(request.urls.images)] if kind else [_no_source()], "nothing is imported")
        return [self._url_item(image) for image in request.urls.images]

    async def _bucket_items(self, source: training_pb2.BucketSource, dataset: str) -> list[_Item]:
        strategy = source.caption_strategy if source.HasField("caption_strategy") else CAPTION_STRATEGIES[0]
        refuse([*one_of("bucket.caption_strategy", strategy, CAPTION_STRATEGIES)], "nothing is imported")
        if source.bucket not in self.source_buckets:
            raise _foreign_bucket(source.bucket, self.source_buckets)
        bucket = self.store.sibling(source.bucket)
        found = await asyncio.to_thread(lambda: list(bucket.list(source.prefix)))
        texts = {info.key for info in found if info.key.endswith(".txt")}
        images = [info for info in found if PurePosixPath(info.key).suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            where = f"s3://{source.bucket}/{source.prefix}"
            raise _nothing(f"{where} holds {len(found)} objects, none of them {_suffixes()}", dataset)
        if len(images) > MAX_SAMPLES:
            raise InvalidArgumentError(
                f"{len(images)} images are above {MAX_SAMPLES}; import smaller prefixes into several datasets"
            )
        return [_bucket_item(bucket, info, source.prefix, strategy, texts) for info in images]

    def _url_item(self, image: training_pb2.UrlImage) -> _Item:
        name = image.name or _name_of(image.url)
        limits = DownloadLimits(hosts=self.source_hosts, max_bytes=MAX_FILE_BYTES)

        def read() -> Sample:
            try:
                body = download(image.url, limits)
            except DownloadError as error:
                raise _UnreadableError(str(error)) from error
            if not body:
                raise _UnreadableError("the file has 0 bytes; check the URL")
            reference = put_object(self.store, image_key(hashlib.sha256(body).hexdigest()), body)
            captions = tuple(caption for caption in image.captions if caption.strip())
            return Sample(name=name, image=reference, captions=captions)

        return _Item(name=name, read=read)


async def _read(item: _Item) -> tuple[_Item, Sample | str]:
    """Read one image; a text says why it cannot be."""
    try:
        return item, await asyncio.to_thread(item.read)
    except _UnreadableError as error:
        return item, str(error)


def _bucket_item(bucket: ObjectStore, info: ObjectInfo, prefix: str, strategy: str, texts: set[str]) -> _Item:
    name = info.key.removeprefix(prefix).lstrip("/") or info.key
    text_key = str(PurePosixPath(info.key).with_suffix(".txt"))

    def read() -> Sample:
        if strategy == "filename":
            captions = _split_lines(PurePosixPath(info.key).stem.replace("_", " "))
        else:
            captions = _read_captions(bucket, text_key) if text_key in texts else ()
        return Sample(name=name, image=_describe(bucket, info), captions=captions)

    return _Item(name=name, read=read)


def _describe(bucket: ObjectStore, info: ObjectInfo) -> common_pb2.ObjectRef:
    """Read an image once and refer to it where it is."""
    body = _get(bucket, info.key, MAX_FILE_BYTES)
    if not body:
        raise _UnreadableError("the file has 0 bytes; upload it again")
    return common_pb2.ObjectRef(uri=bucket.uri(info.key), size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest())


def _read_captions(bucket: ObjectStore, key: str) -> tuple[str, ...]:
    try:
        captions = _split_lines(_get(bucket, key, _MAX_CAPTION_FILE_BYTES).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _UnreadableError(f"its captions in {key} are not UTF-8 ({error.reason}); save them as UTF-8") from error
    if len(captions) > MAX_CAPTIONS or any(len(caption) > MAX_PROMPT_CHARACTERS for caption in captions):
        raise _UnreadableError(
            f"its captions in {key} are above {MAX_CAPTIONS} lines or {MAX_PROMPT_CHARACTERS} characters; shorten them"
        )
    return captions


def _get(bucket: ObjectStore, key: str, max_bytes: int) -> bytes:
    try:
        return bucket.get(key, max_size_bytes=max_bytes)
    except StoreUnavailableError:
        # Nothing that this file is to blame for.
        raise
    except (InvalidArgumentError, FailedPreconditionError, PermissionDeniedError) as error:
        raise _UnreadableError(error.message) from error


def _split_lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _name_of(url: str) -> str:
    return PurePosixPath(unquote(urlsplit(url).path)).name[:255]


def _check_urls(images: Sequence[training_pb2.UrlImage]) -> Iterator[FieldViolation]:
    if not 1 <= len(images) <= MAX_URLS:
        yield violation("urls.images", f"{len(images)} images, must be 1 to {MAX_URLS}; split the list")
    seen: dict[str, int] = {}
    for index, image in enumerate(images):
        path = f"urls.images[{index}]"
        name = image.name or _name_of(image.url)
        if not 1 <= len(name) <= 255 or not name.isprintable():
            yield violation(f"{path}.name", f"{name[:80]!r} needs 1 to 255 printable characters; give it a name")
        if seen.setdefault(name, index) != index:
            yield violation(f"{path}.name", f"{name!r} is also that of urls.images[{seen[name]}]; name them apart")
        if len(image.captions) > MAX_CAPTIONS or any(len(text) > MAX_PROMPT_CHARACTERS for text in image.captions):
            limit = f"{MAX_CAPTIONS} captions of {MAX_PROMPT_CHARACTERS} characters"
            yield violation(f"{path}.captions", f"{name!r} is above {limit}; shorten them")


def _no_source() -> FieldViolation:
    return violation("source", "it is missing; give bucket or urls")


def _foreign_bucket(bucket: str, allowed: Sequence[str]) -> PermissionDeniedError:
    listed = ", ".join(allowed) or "none"
    return PermissionDeniedError(
        f"bucket {bucket[:80]!r} is not one that the trainer may read from (--source-buckets: {listed}); add it to "
        "--source-buckets of the trainer and of the VAE service, or upload the images",
        reason="SOURCE_NOT_ALLOWED",
        metadata={"bucket": bucket[:80]},
    )


def _nothing(why: str, dataset: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"no images detected in dataset {dataset!r}: {why}; check the source",
        reason="NOTHING_TO_IMPORT",
        metadata={"dataset": dataset},
    )


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))
