"""DatasetService: the contract on one side, `Datasets` on the other."""

# ruff: noqa: ARG002, N802 - the contract names the methods and what they are given

import hashlib
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc.aio
from reverie.training.v1 import training_pb2, training_pb2_grpc
from reverie_common.errors import FieldViolation
from reverie_common.storage import ObjectStore
from reverie_common.storage.keys import image_key

from reverie_trainer.jobs.api.paging import read_page, write_token
from reverie_trainer.jobs.api.requests import check_request_id
from reverie_trainer.jobs.catalog.datasets import (
    Datasets,
    MutationId,
    check_files,
    check_samples,
    refuse,
    sample_from_proto,
)
from reverie_trainer.jobs.catalog.imports import Importer
from reverie_trainer.jobs.catalog.manifests import Sample
from reverie_trainer.jobs.checks import check_dataset_name
from reverie_trainer.jobs.preparing.inspection import ImageInspector, scan

UPLOAD_EXPIRES = timedelta(hours=1)


Context = grpc.aio.ServicerContext[Any, Any]


class DatasetServicer(training_pb2_grpc.DatasetServiceServicer):
    """Serves reverie.training.v1.DatasetService."""

    def __init__(self, datasets: Datasets, store: ObjectStore, inspector: ImageInspector, importer: Importer) -> None:
        self._importer = importer
        self._datasets = datasets
        self._store = store
        self._inspector = inspector

    async def CreateDataset(
        self, request: training_pb2.CreateDatasetRequest, context: Context
    ) -> training_pb2.CreateDatasetResponse:
        """See the contract."""
        check_request_id(request.request_id)
        refuse(check_dataset_name(request.name), "the dataset is not created")
        return training_pb2.CreateDatasetResponse(dataset=await self._datasets.create(request.name, request.request_id))

    async def CreateUploads(
        self, request: training_pb2.CreateUploadsRequest, context: Context
    ) -> training_pb2.CreateUploadsResponse:
        """See the contract."""
        refuse(check_files(request.files), "the files cannot be uploaded")
        present = await self._datasets.create_uploads(request.files)
        response = training_pb2.CreateUploadsResponse()
        for file, reference in zip(request.files, present, strict=True):
            upload = response.uploads.add(object=self._datasets.image_reference(file.sha256, file.size_bytes))
            if reference is None:
                upload.upload_url = self._store.presign_put(image_key(file.sha256), expires=UPLOAD_EXPIRES)
        return response

    async def AddSamples(
        self,
        request_iterator: AsyncIterator[training_pb2.AddSamplesRequest],
        context: Context,
    ) -> training_pb2.AddSamplesResponse:
        """See the contract."""
        samples: dict[str, Sample] = {}
        dataset = request_id = ""
        digest = hashlib.sha256()
        violations: list[FieldViolation] = []
        num_read = 0
        async for request in request_iterator:
            dataset, request_id = dataset or request.dataset, request_id or request.request_id
            digest.update(request.SerializeToString(deterministic=True))
            part = [sample_from_proto(sample) for sample in request.samples]
            violations += check_samples(part, self._store, num_read)
            num_read += len(part)
            samples.update({sample.name: sample for sample in part})
        check_request_id(request_id)
        refuse([*check_dataset_name(dataset, "dataset"), *violations], "the samples are not added")
        mutation = MutationId(method="AddSamples", request_id=request_id, digest=digest.hexdigest())
        added = await self._datasets.add(dataset, mutation, list(samples.values()))
        return training_pb2.AddSamplesResponse(
            dataset=added.dataset, num_added=added.num_added, num_replaced=added.num_replaced
        )

    async def ImportSamples(
        self, request: training_pb2.ImportSamplesRequest, context: Context
    ) -> AsyncIterator[training_pb2.ImportSamplesResponse]:
        """See the contract."""
        check_request_id(request.request_id)
        refuse(check_dataset_name(request.dataset, "dataset"), "nothing is imported")
        async for response in self._importer.run(request):
            yield response

    async def GetDataset(
        self, request: training_pb2.GetDatasetRequest, context: Context
    ) -> training_pb2.GetDatasetResponse:
        """See the contract."""
        return training_pb2.GetDatasetResponse(dataset=await self._datasets.get(request.name))

    async def ListDatasets(
        self, request: training_pb2.ListDatasetsRequest, context: Context
    ) -> training_pb2.ListDatasetsResponse:
        """See the contract."""
        page = read_page(request.page_size, request.page_token, "datasets")
        found = await self._datasets.list_after(page.after, page.size + 1)
        shown = found[: page.size]
        token = write_token("datasets", shown[-1].name) if len(found) > page.size else ""
        return training_pb2.ListDatasetsResponse(datasets=shown, next_page_token=token)

    async def DeleteDataset(
        self, request: training_pb2.DeleteDatasetRequest, context: Context
    ) -> training_pb2.DeleteDatasetResponse:
        """See the contract."""
        check_request_id(request.request_id)
        await self._datasets.delete(request.name, request.request_id)
        return training_pb2.DeleteDatasetResponse()

    async def ScanDataset(
        self, request: training_pb2.ScanDatasetRequest, context: Context
    ) -> AsyncIterator[training_pb2.ScanDatasetResponse]:
        """See the contract."""
        manifest = await self._datasets.load(request.name)
        async for response in scan(self._inspector, manifest.samples):
            yield response
