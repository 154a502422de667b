"""Datasets: pictures and captions under a name."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import grpc
from reverie.common.v1.common_pb2 import ObjectRef
from reverie.training.v1 import training_pb2 as pb
from reverie.training.v1.training_pb2_grpc import DatasetServiceStub

from reverie_client.calls import CallPolicy, all_pages, call, new_request_id, repeated, stream
from reverie_client.errors import UrlExpiredError
from reverie_client.folder import LocalFolder, LocalSample, read_folders
from reverie_client.hub import HubSource, read_hub
from reverie_client.transfer import OnProgress, Transfers, Upload, ignore_progress, sha256_of

MAX_FILES_PER_CALL = 1000
MAX_PART_BYTES = 1 << 20
"""Samples are sent in messages of about this size; the limit of a message is 4 MiB."""


class Datasets:
    """`reverie.datasets`: every RPC of DatasetService, and the upload of folders."""

    def __init__(self, channel: grpc.aio.Channel, policy: CallPolicy) -> None:
        """Call the DatasetService behind `channel`."""
        self._stub = DatasetServiceStub(channel)
        self._policy = policy

    async def create(self, name: str, *, request_id: str | None = None) -> pb.Dataset:
        """Create an empty dataset. Raises AlreadyExistsError, InvalidArgumentError."""
        request = pb.CreateDatasetRequest(name=name, request_id=new_request_id(request_id))
        return (await call(self._stub.CreateDataset, request, self._policy)).dataset

    async def upload_folder(
        self, name: str, folder: Path, *, needs_captions: bool = True, on_progress: OnProgress = ignore_progress
    ) -> pb.AddSamplesResponse:
        """Read a folder of pictures and captions, send what the store lacks, and add all of it to a dataset.

        May be repeated: what was sent is not sent again. Raises InvalidArgumentError with every problem of the folder,
        NotFoundError for an unknown dataset, TransferError.
        """
        local = await asyncio.to_thread(read_folders, [folder], needs_captions=needs_captions)
        return await self.upload(name, local, on_progress=on_progress)

    async def upload(
        self, name: str, local: LocalFolder, *, on_progress: OnProgress = ignore_progress
    ) -> pb.AddSamplesResponse:
        """Send folders that `read_folders` has read, as upload_folder does."""
        await self.get(name)
        files = {sample.sha256: sample.path for sample in local.samples}
        files.update({sample.mask.sha256: sample.mask.path for sample in local.samples if sample.mask is not None})
        sent = await self.send_files(files, on_progress=on_progress)
        return await self.add(name, [_sample_message(sample, sent) for sample in local.samples])

    async def upload_hub(
        self, name: str, source: HubSource, *, on_progress: OnProgress = ignore_progress
    ) -> tuple[pb.AddSamplesResponse, ...]:
        """Send a dataset of the Hugging Face Hub, a part at a time, as upload does; needs `reverie[imports]`.

        May be repeated: what was sent is not sent again. Raises InvalidArgumentError for a dataset that cannot be read.
        """
        await self.get(name)
        parts = read_hub(source)
        answers = []
        try:
            while (part := await asyncio.to_thread(next, parts, None)) is not None:
                answers.append(await self.upload(name, part, on_progress=on_progress))
        finally:
            parts.close()
        return tuple(answers)

    async def import_bucket(
        self,
        name: str,
        bucket: str,
        prefix: str = "",
        *,
        captions: str = "textfile",
        request_id: str | None = None,
    ) -> AsyncIterator[pb.ImportSamplesResponse]:
        """Add the images under a prefix of another bucket where they are; yields progress, last the dataset.

        `captions` is `textfile` or `filename`. Raises PermissionDeniedError for a bucket that the trainer may not read.
        """
        request = pb.ImportSamplesRequest(
            dataset=name,
            request_id=new_request_id(request_id),
            bucket=pb.BucketSource(bucket=bucket, prefix=prefix, caption_strategy=captions),
        )
        async for response in stream(self._stub.ImportSamples, request, self._policy):
            yield response

    async def import_urls(
        self, name: str, images: Sequence[pb.UrlImage], *, request_id: str | None = None
    ) -> AsyncIterator[pb.ImportSamplesResponse]:
        """Add at most 10,000 images of the web, on hosts that the trainer allows; yields progress, last the dataset."""
        request = pb.ImportSamplesRequest(
            dataset=name, request_id=new_request_id(request_id), urls=pb.UrlSource(images=images)
        )
        async for response in stream(self._stub.ImportSamples, request, self._policy):
            yield response

    async def send_files(
        self, files: dict[str, Path], *, on_progress: OnProgress = ignore_progress
    ) -> dict[str, ObjectRef]:
        """Bring files (by sha256) to the store and return their references; what is there is not sent again."""
        try:
            return await self._send_once(files, on_progress)
        except UrlExpiredError:  # a long upload outlives its URLs; what is done is not sent again
            return await self._send_once(files, on_progress)

    async def send_file(self, path: Path) -> ObjectRef:
        """Bring one file to the store and return its reference."""
        digest = await asyncio.to_thread(sha256_of, path)
        return (await self.send_files({digest: path}))[digest]

    async def _send_once(self, files: dict[str, Path], on_progress: OnProgress) -> dict[str, ObjectRef]:
        asked = [pb.FileDigest(sha256=digest, size_bytes=path.stat().st_size) for digest, path in files.items()]
        places: list[pb.Upload] = []
        for start in range(0, len(asked), MAX_FILES_PER_CALL):
            request = pb.CreateUploadsRequest(files=asked[start : start + MAX_FILES_PER_CALL])
            places += (await call(self._stub.CreateUploads, request, self._policy)).uploads
        missing = [
            Upload(url=place.upload_url, path=files[file.sha256], size_bytes=file.size_bytes)
            for file, place in zip(asked, places, strict=True)
            if place.upload_url
        ]
        async with Transfers(on_progress) as transfers:
            await transfers.upload(missing)
        return {file.sha256: place.object for file, place in zip(asked, places, strict=True)}

    async def add(
        self, name: str, samples: Sequence[pb.Sample], *, request_id: str | None = None
    ) -> pb.AddSamplesResponse:
        """Add samples whose images have been uploaded; one of the same name is replaced. All or nothing."""
        first = pb.AddSamplesRequest(dataset=name, request_id=new_request_id(request_id))

        async def attempt() -> pb.AddSamplesResponse:
            return await self._stub.AddSamples(_parts(first, samples), timeout=self._policy.stream_timeout_seconds)

        return await repeated(attempt, self._policy)

    async def get(self, name: str) -> pb.Dataset:
        """Return one dataset. Raises NotFoundError."""
        return (await call(self._stub.GetDataset, pb.GetDatasetRequest(name=name), self._policy)).dataset

    async def list(self, *, limit: int | None = None) -> tuple[pb.Dataset, ...]:
        """Return datasets by name, at most `limit`."""

        async def page(token: str) -> pb.ListDatasetsResponse:
            request = pb.ListDatasetsRequest(page_token=token, page_size=min(limit or 100, 100))
            return await call(self._stub.ListDatasets, request, self._policy)

        return await all_pages(page, lambda found: found.datasets, limit)

    async def delete(self, name: str, *, request_id: str | None = None) -> None:
        """Delete a dataset. Raises FailedPreconditionError while a job at work uses it."""
        request = pb.DeleteDatasetRequest(name=name, request_id=new_request_id(request_id))
        await call(self._stub.DeleteDataset, request, self._policy)

    async def scan(self, name: str) -> AsyncIterator[pb.ScanDatasetResponse]:
        """Open every image and yield one response for each, with its size or what is wrong with it."""
        async for response in stream(self._stub.ScanDataset, pb.ScanDatasetRequest(name=name), self._policy):
            yield response


def _sample_message(sample: LocalSample, sent: dict[str, ObjectRef]) -> pb.Sample:
    message = pb.Sample(name=sample.name, image=sent[sample.sha256], captions=sample.captions)
    if sample.mask is not None:
        message.mask.CopyFrom(sent[sample.mask.sha256])
    return message


def _parts(first: pb.AddSamplesRequest, samples: Sequence[pb.Sample]) -> Iterator[pb.AddSamplesRequest]:
    """Cut samples into messages well below the limit of a message; the first one names the dataset."""
    part = pb.AddSamplesRequest()
    part.CopyFrom(first)
    size_bytes = 0
    for sample in samples:
        if size_bytes > MAX_PART_BYTES:
            yield part
            part, size_bytes = pb.AddSamplesRequest(), 0
        part.samples.append(sample)
        size_bytes += sample.ByteSize()
    yield part
