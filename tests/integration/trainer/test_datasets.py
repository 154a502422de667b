"""Datasets: uploads straight into the store, samples that are checked, versions that follow the content."""

import asyncio
import hashlib
import urllib.error
import urllib.request
import uuid
from typing import Any

import pytest
from reverie.training.v1 import training_pb2
from reverie_common.errors import AlreadyExistsError, FailedPreconditionError, InvalidArgumentError, NotFoundError
from reverie_common.rpc.channel import translated


async def create(trainer: Any, name: str, request_id: str = "") -> training_pb2.Dataset:
    request = training_pb2.CreateDatasetRequest(name=name, request_id=request_id)
    dataset: training_pb2.Dataset = (await trainer.datasets.CreateDataset(request)).dataset
    return dataset


async def add(
    trainer: Any, name: str, *samples: training_pb2.Sample, request_id: str = ""
) -> training_pb2.AddSamplesResponse:
    # One sample in a message: the parts of a stream belong together.
    requests = [training_pb2.AddSamplesRequest(samples=[sample]) for sample in samples]
    first = training_pb2.AddSamplesRequest(dataset=name, request_id=request_id)
    response: training_pb2.AddSamplesResponse = await trainer.datasets.AddSamples(iter([first, *requests]))
    return response


def sample(trainer: Any, name: str, body: str, *captions: str) -> training_pb2.Sample:
    return training_pb2.Sample(name=name, image=trainer.put_image(body), captions=captions)


def put(url: str, body: bytes) -> int:
    request = urllib.request.Request(url, data=body, method="PUT", headers={"If-None-Match": "*"})  # noqa: S310 - http
    try:
        with urllib.request.urlopen(request) as response:  # noqa: S310 - our own server
            status: int = response.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    return status


async def test_files_are_uploaded_once_and_then_known(trainer: Any) -> None:
    body = b"640x480 upload"
    file = training_pb2.FileDigest(sha256=hashlib.sha256(body).hexdigest(), size_bytes=len(body))
    request = training_pb2.CreateUploadsRequest(files=[file])
    upload = (await trainer.datasets.CreateUploads(request)).uploads[0]
    assert await asyncio.to_thread(put, upload.upload_url, body) == 200
    assert await asyncio.to_thread(put, upload.upload_url, body) == 412
    again = (await trainer.datasets.CreateUploads(request)).uploads[0]
    assert (again.upload_url, again.object) == ("", upload.object)
    await create(trainer, "uploaded")
    added = await add(trainer, "uploaded", training_pb2.Sample(name="a.png", image=upload.object, captions=["a"]))
    assert (added.dataset.num_samples, added.dataset.size_bytes) == (1, len(body))


async def test_same_samples_have_the_same_version_in_any_order(trainer: Any) -> None:
    a, b = sample(trainer, "a.png", "64x64 va", "a cat"), sample(trainer, "b.png", "64x64 vb", "a dog")
    empty = await create(trainer, "version-one")
    await create(trainer, "version-two")
    one = (await add(trainer, "version-one", a, b)).dataset.version
    await add(trainer, "version-two", b)
    assert (await add(trainer, "version-two", a)).dataset.version == one
    assert empty.version != one


async def test_sample_of_the_same_name_is_replaced(trainer: Any) -> None:
    await create(trainer, "replaced")
    await add(trainer, "replaced", sample(trainer, "a.png", "64x64 ra", "old"))
    changed = sample(trainer, "a.png", "64x64 ra", "new")
    response = await add(trainer, "replaced", changed, sample(trainer, "b.png", "64x64 rb", "b"))
    assert (response.num_added, response.num_replaced, response.dataset.num_samples) == (1, 1, 2)


async def test_repeated_addition_is_recognised(trainer: Any) -> None:
    await create(trainer, "repeated")
    request_id = str(uuid.uuid4())
    a, b = sample(trainer, "a.png", "64x64 pa", "a"), sample(trainer, "b.png", "64x64 pb", "b")
    first = await add(trainer, "repeated", a, request_id=request_id)
    again = await add(trainer, "repeated", a, request_id=request_id)
    assert again.dataset == first.dataset
    with pytest.raises(AlreadyExistsError), translated():
        await add(trainer, "repeated", b, request_id=request_id)


async def test_everything_wrong_with_samples_is_told_and_nothing_added(trainer: Any) -> None:
    await create(trainer, "wrong")
    good = sample(trainer, "good.png", "64x64 good", "a cat")
    long = sample(trainer, "long.png", "64x64 long", "x" * 10_000)
    foreign = training_pb2.Sample(name="foreign.png", image=good.image)
    foreign.image.uri = "s3://elsewhere/cat.png"
    unnamed = sample(trainer, "", "64x64 unnamed")
    undigested = training_pb2.Sample(name="undigested.png")
    with pytest.raises(InvalidArgumentError) as caught, translated():
        await add(trainer, "wrong", good, long, foreign, unnamed, undigested)
    found = {violation.field: violation.description for violation in caught.value.violations}
    assert set(found) == {
        "samples[1].captions[0]",
        "samples[2].image.uri",
        "samples[3].name",
        "samples[4].image.sha256",
    }
    assert "'long.png' has 10000 characters, the limit is 8192" in found["samples[1].captions[0]"]
    dataset = await trainer.datasets.GetDataset(training_pb2.GetDatasetRequest(name="wrong"))
    assert dataset.dataset.num_samples == 0


async def test_image_that_was_not_uploaded_is_refused(trainer: Any) -> None:
    await create(trainer, "absent")
    absent = sample(trainer, "absent.png", "64x64 absent")
    trainer.store.delete(trainer.store.key_of(absent.image.uri))
    shorter = sample(trainer, "shorter.png", "64x64 shorter")
    shorter.image.size_bytes += 1
    with pytest.raises(InvalidArgumentError) as caught, translated():
        await add(trainer, "absent", absent, shorter)
    assert ["not been uploaded" in item.description for item in caught.value.violations] == [True, False]


async def test_wrong_files_are_all_told(trainer: Any) -> None:
    files = [
        training_pb2.FileDigest(sha256="ABC", size_bytes=1),
        training_pb2.FileDigest(sha256="0" * 64, size_bytes=300 * 1024 * 1024),
    ]
    with pytest.raises(InvalidArgumentError) as caught, translated():
        await trainer.datasets.CreateUploads(training_pb2.CreateUploadsRequest(files=files))
    assert [item.field for item in caught.value.violations] == ["files[0].sha256", "files[1].size_bytes"]
    with pytest.raises(InvalidArgumentError), translated():
        await trainer.datasets.CreateUploads(training_pb2.CreateUploadsRequest())


async def test_name_is_taken_once_and_its_request_repeatable(trainer: Any) -> None:
    request_id = str(uuid.uuid4())
    first = await create(trainer, "taken", request_id)
    assert await create(trainer, "taken", request_id) == first
    with pytest.raises(AlreadyExistsError) as caught, translated():
        await create(trainer, "taken")
    assert caught.value.reason == "DATASET_EXISTS"
    with pytest.raises(InvalidArgumentError), translated():
        await create(trainer, "Bad Name")
    with pytest.raises(InvalidArgumentError), translated():
        await create(trainer, "long-request-id", "x" * 37)


async def test_datasets_are_listed_by_name_in_pages(trainer: Any) -> None:
    for name in ("page-c", "page-a", "page-b"):
        await create(trainer, name)
    first = await trainer.datasets.ListDatasets(training_pb2.ListDatasetsRequest(page_size=2))
    rest = await trainer.datasets.ListDatasets(training_pb2.ListDatasetsRequest(page_token=first.next_page_token))
    assert [item.name for item in [*first.datasets, *rest.datasets]] == ["page-a", "page-b", "page-c"]
    assert rest.next_page_token == ""


async def test_dataset_at_work_is_kept_and_others_are_deleted(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("at-work", [("512x512 w", ["a cat"])])
    await trainer.submit(make_spec("at-work", "steps=9", "slow=60"))
    delete = training_pb2.DeleteDatasetRequest(name="at-work")
    with pytest.raises(FailedPreconditionError) as caught, translated():
        await trainer.datasets.DeleteDataset(delete)
    assert caught.value.reason == "DATASET_IN_USE"
    await create(trainer, "idle")
    request = training_pb2.DeleteDatasetRequest(name="idle", request_id=str(uuid.uuid4()))
    await trainer.datasets.DeleteDataset(request)
    await trainer.datasets.DeleteDataset(request)
    with pytest.raises(NotFoundError), translated():
        await trainer.datasets.GetDataset(training_pb2.GetDatasetRequest(name="idle"))


async def test_job_trains_on_the_version_that_it_was_accepted_with(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("pinned", [("512x512 p1", ["a cat"])])
    await trainer.submit(make_spec("pinned", "steps=1", "slow=0.5"))
    job = await trainer.submit(make_spec("pinned", "steps=1"))
    await add(trainer, "pinned", sample(trainer, "more.png", "512x512 p2", "a dog"))
    assert (await trainer.finish(job.job_id)).preparation.num_images == 1


async def test_deletion_takes_the_images_that_nobody_else_has(trainer: Any) -> None:
    own, shared = sample(trainer, "own.png", "64x64 own"), sample(trainer, "shared.png", "64x64 shared")
    for name, samples in (("deleted", (own, shared)), ("kept", (shared,))):
        await create(trainer, name)
        await add(trainer, name, *samples)
    await trainer.datasets.DeleteDataset(training_pb2.DeleteDatasetRequest(name="deleted"))
    heads = [trainer.store.head(trainer.store.key_of(item.image.uri)) for item in (own, shared)]
    assert [head is not None for head in heads] == [False, True]
    assert not list(trainer.store.list("v1/dataset/deleted/"))
    await create(trainer, "deleted")


async def test_images_of_a_job_that_may_be_resumed_outlive_their_dataset(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("resumable", [("512x512 resumable", ["a cat"])])
    job = await trainer.finish((await trainer.submit(make_spec("resumable", "steps=3", "fail=1"))).job_id)
    await trainer.datasets.DeleteDataset(training_pb2.DeleteDatasetRequest(name="resumable"))
    await trainer.training.ResumeTrainingJob(training_pb2.ResumeTrainingJobRequest(job_id=job.job_id))
    again = await trainer.finish(job.job_id)
    assert (again.failure.reason, again.num_worker_starts) == ("NOT_FINITE", 2)
    image = trainer.put_image("512x512 resumable")
    assert trainer.store.head(trainer.store.key_of(image.uri)) is not None


async def test_scan_tells_of_each_sample(trainer: Any) -> None:
    samples = [("640x480 s", ["a cat"]), ("broken s", ["a cat"]), ("64x64 s", [])]
    await trainer.add_dataset("scan", samples)
    stream = trainer.datasets.ScanDataset(training_pb2.ScanDatasetRequest(name="scan"))
    found = {response.sample: response async for response in stream}
    assert (found["000.png"].width, found["000.png"].height, list(found["000.png"].problems)) == (640, 480, [])
    assert list(found["001.png"].problems) == ["the file ends early; export it again"]
    assert "no caption" in found["002.png"].problems[0]
    assert sorted(response.num_done for response in found.values()) == [1, 2, 3]
    assert {response.num_total for response in found.values()} == {3}
