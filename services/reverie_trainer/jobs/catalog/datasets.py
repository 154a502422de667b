"""Datasets: a name in the database for the newest of the immutable manifests in the store."""

import asyncio
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from reverie.common.v1 import common_pb2
from reverie.training.v1 import training_pb2
from reverie_common.errors import (
    AbortedError,
    AlreadyExistsError,
    FailedPreconditionError,
    FieldViolation,
    InvalidArgumentError,
    NotFoundError,
)
from reverie_common.storage import JSON_MEDIA_TYPE, OBJECT_MEDIA_TYPE, ObjectStore
from reverie_common.storage.keys import dataset_manifest_key, image_key
from sqlalchemy import select
from sqlalchemy.orm import Session

from reverie_trainer.jobs.api.requests import find_repetition, remember
from reverie_trainer.jobs.catalog.manifests import (
    Manifest,
    Sample,
    delete_contents,
    is_uploaded,
    manifest_body,
    parse_manifest,
)
from reverie_trainer.jobs.checks import MAX_PROMPT_CHARACTERS
from reverie_trainer.jobs.state.database import Database
from reverie_trainer.jobs.state.models import DatasetRow, JobRow
from reverie_trainer.jobs.state.records import ACTIVE_STATES, CANCELLED, FAILED

MAX_SAMPLES = 200_000
MAX_CAPTIONS = 100
MAX_FILE_BYTES = 256 * 1024 * 1024

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PARALLEL_HEADS = 16
_ATTEMPTS = 5
_MAX_VIOLATIONS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class MutationId:
    """What tells the repetition of a call from a new one."""

    method: str
    request_id: str
    digest: str
    """Over the whole request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedSamples:
    """What AddSamples did."""

    dataset: training_pb2.Dataset
    num_added: int = 0
    num_replaced: int = 0


class Datasets:
    """The datasets of this trainer."""

    def __init__(self, database: Database, store: ObjectStore) -> None:
        self._database = database
        self._store = store
        # Between the look whether images are there and the new version that refers to them, none may be deleted.
        self._images = asyncio.Lock()

    async def create(self, name: str, request_id: str) -> training_pb2.Dataset:
        """Create an empty dataset; the same request returns the first one."""
        manifest = Manifest(samples=())
        async with self._images:
            await self._write_manifest(name, manifest)
            return await self._database.run(lambda session: _create(session, name, request_id, manifest))

    async def get(self, name: str) -> training_pb2.Dataset:
        """Return a dataset; raises NotFoundError."""
        return await self._database.run(lambda session: dataset_message(require_dataset(session, name)))

    async def list_after(self, after_name: str | None, limit: int) -> list[training_pb2.Dataset]:
        """Return datasets by name, from after a name."""
        return await self._database.run(lambda session: _list(session, after_name, limit))

    async def delete(self, name: str, request_id: str) -> None:
        """Delete a dataset and the images that no other dataset has.

        Where a job could still be resumed that trains on it, only its name is freed.

        Raises:
            NotFoundError: there is no such dataset.
            FailedPreconditionError: a job at work uses it.
        """
        async with self._images:
            is_unused = await self._database.run(lambda session: _delete(session, name, request_id))
            if is_unused:
                await asyncio.to_thread(delete_contents, self._store, name)

    async def versions(self, names: Iterable[str]) -> dict[str, str]:
        """Return the newest version of each dataset that exists."""
        wanted = set(names)
        return await self._database.run(lambda session: _versions(session, wanted))

    async def names(self) -> Sequence[str]:
        """Return the name of every dataset."""
        return await self._database.run(lambda session: session.scalars(select(DatasetRow.name)).all())

    async def load(self, name: str, version: str | None = None) -> Manifest:
        """Return a version of a dataset, the newest by default.

        Raises:
            NotFoundError: there is no such dataset or version.
        """
        if version is None:
            version = (await self.get(name)).version
        key = dataset_manifest_key(name, version)
        return await asyncio.to_thread(lambda: parse_manifest(self._store.get(key)))

    async def create_uploads(self, files: Sequence[training_pb2.FileDigest]) -> list[common_pb2.ObjectRef | None]:
        """Return, for each file, its object where the store holds it already, None where it has to be uploaded."""
        sizes = await self._sizes([image_key(file.sha256) for file in files])
        return [
            self.image_reference(file.sha256, file.size_bytes) if size == file.size_bytes else None
            for file, size in zip(files, sizes, strict=True)
        ]

    def image_reference(self, sha256: str, size_bytes: int) -> common_pb2.ObjectRef:
        """Return the object that an image file is, or will be."""
        uri = self._store.uri(image_key(sha256))
        return common_pb2.ObjectRef(uri=uri, size_bytes=size_bytes, sha256=sha256, media_type=OBJECT_MEDIA_TYPE)

    async def repeated(self, request: MutationId) -> training_pb2.Dataset | None:
        """Return the dataset that the same request was carried out on before, None for a new request."""
        name = await self._database.run(
            lambda session: find_repetition(session, request.method, request.request_id, request.digest)
        )
        return None if name is None else await self.get(name)

    async def add(self, name: str, request: MutationId, samples: Sequence[Sample]) -> AddedSamples:
        """Add samples whose images are in the store; one of the same name is replaced. All or nothing.

        Raises:
            InvalidArgumentError: with everything that is wrong with the samples.
            NotFoundError: there is no such dataset.
        """
        repeated = await self.repeated(request)
        if repeated is not None:
            return AddedSamples(dataset=repeated)
        await self.get(name)
        async with self._images:
            await self._require_images(samples)
            for _ in range(_ATTEMPTS):
                added = await self._try_to_add(name, request, samples)
                if added is not None:
                    return added
        raise AbortedError(
            f"dataset {name!r} was changed by others {_ATTEMPTS} times in a row; repeat the call",
            reason="DATASET_CHANGED",
            metadata={"dataset": name},
        )

    async def _try_to_add(self, name: str, request: MutationId, samples: Sequence[Sample]) -> AddedSamples | None:
        before = (await self.get(name)).version
        present = {sample.name: sample for sample in (await self.load(name, before)).samples}
        num_replaced = len(present.keys() & {sample.name for sample in samples})
        present.update({sample.name: sample for sample in samples})
        if len(present) > MAX_SAMPLES:
            description = f"{len(present)} samples are above {MAX_SAMPLES}; split the dataset"
            raise InvalidArgumentError(
                description, violations=[FieldViolation(field="samples", description=description)]
            )
        manifest = Manifest(samples=tuple(present[key] for key in sorted(present)))
        await self._write_manifest(name, manifest)
        dataset = await self._database.run(lambda session: _replace(session, name, before, manifest, request))
        if dataset is None:
            return None
        return AddedSamples(dataset=dataset, num_added=len(samples) - num_replaced, num_replaced=num_replaced)

    async def _write_manifest(self, name: str, manifest: Manifest) -> None:
        body = await asyncio.to_thread(manifest_body, manifest)
        key = dataset_manifest_key(name, manifest.version)
        await asyncio.to_thread(lambda: self._store.create(key, body, media_type=JSON_MEDIA_TYPE))

    async def _require_images(self, samples: Sequence[Sample]) -> None:
        files = [
            (f"samples[{index}].{field}", sample.name, file)
            for index, sample in enumerate(samples)
            for field, file in zip(("image", "mask"), sample.files, strict=False)
            if is_uploaded(file, self._store)
        ]
        sizes = await self._sizes([image_key(file.sha256) for _, _, file in files])
        violations = []
        for (field, name, file), size in zip(files, sizes, strict=True):
            if size != file.size_bytes:
                found = "it has not been uploaded" if size is None else f"the store holds {size} bytes of it"
                violations.append(
                    FieldViolation(
                        field=field,
                        description=f"{name!r}: {found}, expected {file.size_bytes} bytes; upload the file to the URL "
                        "that CreateUploads gives",
                    )
                )
        refuse(violations, "images are missing from the store")

    async def _sizes(self, keys: Sequence[str]) -> list[int | None]:
        return await asyncio.to_thread(_head_all, self._store, keys)


def require_dataset(session: Session, name: str) -> DatasetRow:
    """Return a dataset's row; raises NotFoundError."""
    row = session.get(DatasetRow, name)
    if row is None:
        raise NotFoundError(
            f"there is no dataset {name[:80]!r}; ListDatasets (`reverie dataset list`) shows all",
            reason="DATASET_NOT_FOUND",
            metadata={"dataset": name[:80]},
        )
    return row


def dataset_message(row: DatasetRow) -> training_pb2.Dataset:
    """Return a dataset as the contract shows it."""
    return training_pb2.Dataset(
        name=row.name, num_samples=row.num_samples, size_bytes=row.size_bytes, version=row.version
    )


def check_files(files: Sequence[training_pb2.FileDigest]) -> list[FieldViolation]:
    """Return what is wrong with the files of CreateUploads."""
    violations = []
    if not 1 <= len(files) <= 1000:
        violations.append(FieldViolation(field="files", description=f"{len(files)} files; give 1 to 1000 at a time"))
    for index, file in enumerate(files):
        if not _SHA256.fullmatch(file.sha256):
            violations.append(
                FieldViolation(
                    field=f"files[{index}].sha256", description=f"{file.sha256[:80]!r} is no lower-case hex sha256"
                )
            )
        if file.size_bytes > MAX_FILE_BYTES:
            violations.append(
                FieldViolation(
                    field=f"files[{index}].size_bytes",
                    description=f"{file.size_bytes} is above {MAX_FILE_BYTES}; scale the image down",
                )
            )
    return violations[:_MAX_VIOLATIONS]


def check_samples(samples: Sequence[Sample], store: ObjectStore, first_index: int = 0) -> list[FieldViolation]:
    """Return what is wrong with samples, apart from whether their images are in the store."""
    violations = []
    for index, sample in enumerate(samples, start=first_index):
        path = f"samples[{index}]"
        if not 1 <= len(sample.name) <= 255 or not sample.name.isprintable():
            violations.append(
                FieldViolation(
                    field=f"{path}.name", description=f"{sample.name[:80]!r} needs 1 to 255 printable characters"
                )
            )
        for field, file in zip(("image", "mask"), sample.files, strict=False):
            violations += _check_file(f"{path}.{field}", sample.name, file, store)
        if len(sample.captions) > MAX_CAPTIONS:
            violations.append(
                FieldViolation(
                    field=f"{path}.captions",
                    description=f"{sample.name!r} has {len(sample.captions)} captions, the limit is {MAX_CAPTIONS}",
                )
            )
        violations += [
            FieldViolation(
                field=f"{path}.captions[{number}]",
                description=f"the caption of {sample.name!r} has {len(caption)} characters, the limit is "
                f"{MAX_PROMPT_CHARACTERS}; shorten it (encoders read 128 tokens)",
            )
            for number, caption in enumerate(sample.captions)
            if len(caption) > MAX_PROMPT_CHARACTERS
        ]
    return violations[:_MAX_VIOLATIONS]


def refuse(violations: Sequence[FieldViolation], summary: str) -> None:
    """Raise InvalidArgumentError with violations, if there are any."""
    if violations:
        first = violations[0]
        more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        raise InvalidArgumentError(
            f"{summary}: {first.field}: {first.description}{more}", violations=violations[:_MAX_VIOLATIONS]
        )


def sample_from_proto(message: training_pb2.Sample) -> Sample:
    """Return the domain form of a sample; captions of white space only count as missing."""
    captions = tuple(caption for caption in message.captions if caption.strip())
    mask = message.mask if message.HasField("mask") else None
    return Sample(name=message.name, image=message.image, captions=captions, mask=mask)


def _check_file(path: str, name: str, file: common_pb2.ObjectRef, store: ObjectStore) -> list[FieldViolation]:
    if not _SHA256.fullmatch(file.sha256):
        description = f"{name!r} has sha256 {file.sha256[:80]!r}, which is no lower-case hex sha256"
        return [FieldViolation(field=f"{path}.sha256", description=description)]
    if not is_uploaded(file, store):
        expected = store.uri(image_key(file.sha256))
        description = f"{name!r} has uri {file.uri[:200]!r}, expected {expected!r} as CreateUploads gives it"
        return [FieldViolation(field=f"{path}.uri", description=description)]
    return []


def _head_all(store: ObjectStore, keys: Sequence[str]) -> list[int | None]:
    with ThreadPoolExecutor(max_workers=_PARALLEL_HEADS, thread_name_prefix="head") as pool:
        found = pool.map(store.head, keys)
        return [info.size_bytes if info is not None else None for info in found]


def _create(session: Session, name: str, request_id: str, manifest: Manifest) -> training_pb2.Dataset:
    repeated = find_repetition(session, "CreateDataset", request_id, name)
    if repeated is not None:
        return dataset_message(require_dataset(session, repeated))
    if session.get(DatasetRow, name) is not None:
        raise AlreadyExistsError(
            f"there is a dataset {name!r} already; take another name, or add to it",
            reason="DATASET_EXISTS",
            metadata={"dataset": name},
        )
    row = DatasetRow(name=name, version=manifest.version, num_samples=0, size_bytes=0)
    session.add(row)
    remember(session, "CreateDataset", request_id, name, name)
    return dataset_message(row)


def _list(session: Session, after_name: str | None, limit: int) -> list[training_pb2.Dataset]:
    query = select(DatasetRow).order_by(DatasetRow.name).limit(limit)
    if after_name is not None:
        query = query.where(DatasetRow.name > after_name)
    return [dataset_message(row) for row in session.scalars(query)]


def _versions(session: Session, names: set[str]) -> dict[str, str]:
    rows = session.scalars(select(DatasetRow).where(DatasetRow.name.in_(names)))
    return {row.name: row.version for row in rows}


def _replace(
    session: Session, name: str, before: str, manifest: Manifest, request: MutationId
) -> training_pb2.Dataset | None:
    row = require_dataset(session, name)
    if row.version != before:
        return None
    row.version = manifest.version
    row.num_samples = len(manifest.samples)
    row.size_bytes = manifest.size_bytes
    remember(session, request.method, request.request_id, request.digest, name)
    return dataset_message(row)


def _delete(session: Session, name: str, request_id: str) -> bool:
    """Forget a dataset; return whether no job can ever need what it holds again."""
    if find_repetition(session, "DeleteDataset", request_id, name) is not None:
        return False
    row = require_dataset(session, name)
    users = _users(session, name, ACTIVE_STATES)
    if users:
        raise FailedPreconditionError(
            f"dataset {name!r} is used by {', '.join(users)}; wait for them or cancel them",
            reason="DATASET_IN_USE",
            metadata={"dataset": name, "jobs": ",".join(users)},
        )
    session.delete(row)
    remember(session, "DeleteDataset", request_id, name, name)
    return not _users(session, name, (FAILED, CANCELLED))


def _users(session: Session, name: str, states: Sequence[int]) -> list[str]:
    rows = session.scalars(select(JobRow).where(JobRow.state.in_(states)))
    return [row.job_id for row in rows if name in row.dataset_versions]
