"""Preparation with the real encoder and VAE services on the tiny checkpoint."""

import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.json_format import ParseDict
from PIL import Image
from reverie.common.v1.common_pb2 import TensorRef
from reverie.training.v1 import job_pb2, training_pb2
from reverie_common.rpc.server import Server
from reverie_common.storage import S3Store, get_tensor
from reverie_encoder.service import EncoderService
from reverie_encoder.settings import EncoderSettings
from reverie_hidream.tensor_io import from_raw
from reverie_vae.service import VaeService
from reverie_vae.settings import VaeSettings

CAPTION = "a red square " * 80


@pytest.fixture
async def real_flags(tiny_checkpoint: Path, module_s3_store: S3Store) -> AsyncIterator[dict[str, Any]]:
    """Settings of a trainer that asks the real services, which serve."""
    common: dict[str, Any] = {"checkpoint": str(tiny_checkpoint), "port": 0, "metrics_port": 0, "grace_seconds": 0.0}
    encoder_settings, vae_settings = EncoderSettings(**common), VaeSettings(**common)
    encoder, vae = EncoderService(encoder_settings, module_s3_store), VaeService(vae_settings, module_s3_store)
    async with (
        Server([encoder.served], encoder_settings, load=encoder.load, stop=encoder.close) as encoder_server,
        Server([vae.served], vae_settings, load=vae.load, stop=vae.close) as vae_server,
    ):
        yield {
            "encoders": (encoder_server.target,),
            "vae": vae_server.target,
            "checkpoint": str(tiny_checkpoint),
        }


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (width % 256, height % 256, 40)).save(buffer, "JPEG")
    return buffer.getvalue()


async def add_pictures(trainer: Any, name: str, pictures: dict[str, tuple[bytes, str]]) -> None:
    await trainer.datasets.CreateDataset(training_pb2.CreateDatasetRequest(name=name))
    samples = [
        training_pb2.Sample(name=file, image=trainer.put_bytes(body), captions=[caption])
        for file, (body, caption) in pictures.items()
    ]
    await trainer.datasets.AddSamples(iter([training_pb2.AddSamplesRequest(dataset=name, samples=samples)]))


async def test_real_services_prepare_what_the_manifest_says(
    start_trainer: Any, real_flags: dict[str, Any], make_spec: Any
) -> None:
    trainer = await start_trainer(**real_flags)
    pictures = {
        "a.jpg": (picture(300, 200), "a red square"),
        "b.jpg": (picture(200, 300), CAPTION),
        "c.jpg": (picture(240, 240), "a red square"),
        "d.jpg": (picture(400, 300)[:500], "cut short"),
        "e.jpg": (b"", "nothing"),
    }
    await add_pictures(trainer, "real", pictures)
    job = await trainer.finish((await trainer.submit(make_spec("real"))).job_id)
    assert job.state == job_pb2.TRAINING_JOB_STATE_SUCCEEDED, job.failure
    report = job.preparation
    assert [item.sample for item in report.rejected] == ["d.jpg", "e.jpg"]
    assert (report.num_images, report.num_prompts) == (3, 3)
    assert {item.encoder for item in report.truncated} == {"clip_l", "clip_g", "t5", "llama"}
    keys = [info.key for info in trainer.store.list("v1/prepared/")]
    manifest = json.loads(trainer.store.get(keys[0]))
    for sample in manifest["samples"]:
        latents = get_tensor(trainer.store, ParseDict(sample["latents"], TensorRef()))
        assert latents.shape == (2, 16, sample["height"] // 8, sample["width"] // 8)
        embeddings = sample["captions"][0][0]["embeddings"]
        shapes = {
            name: get_tensor(trainer.store, ParseDict(ref, TensorRef())).shape for name, ref in embeddings.items()
        }
        assert shapes["llama"][1] == shapes["t5"][0] == 128


async def test_second_job_on_real_services_encodes_nothing(
    start_trainer: Any, real_flags: dict[str, Any], make_spec: Any
) -> None:
    trainer = await start_trainer(**real_flags)
    await add_pictures(trainer, "twice", {"a.jpg": (picture(256, 128), "a green square")})
    await trainer.finish((await trainer.submit(make_spec("twice"))).job_id)
    report = (await trainer.finish((await trainer.submit(make_spec("twice"))).job_id)).preparation
    assert (report.num_images_cached, report.num_prompts_cached) == (1, 2)
    # Other crops of the same image: the captions are known, the latents are new.
    spec = make_spec("twice")
    spec.datasets[0].crop = True
    cropped = (await trainer.finish((await trainer.submit(spec)).job_id)).preparation
    assert (cropped.num_images_cached, cropped.num_prompts_cached) == (0, 2)


def read_manifests(trainer: Any) -> list[dict[str, Any]]:
    """Every prepared manifest in the store."""
    return [json.loads(trainer.store.get(info.key)) for info in trainer.store.list("v1/prepared/")]


async def prepare(trainer: Any, spec: job_pb2.TrainingJobSpec) -> tuple[job_pb2.PreparationReport, dict[str, Any], str]:
    """Run a job; return its report, the manifest that it made, and the messages of its notices."""
    before = read_manifests(trainer)
    events = await trainer.watch((await trainer.submit(spec)).job_id)
    assert events[-1].snapshot.state == job_pb2.TRAINING_JOB_STATE_SUCCEEDED, events[-1].snapshot.failure
    (manifest,) = [found for found in read_manifests(trainer) if found not in before]
    return events[-1].snapshot.preparation, manifest, " ".join(event.notice.message for event in events)


def embeddings_of(trainer: Any, manifest: dict[str, Any], encoder: str) -> dict[str, torch.Tensor]:
    """Float64 embeddings of every prompt of a manifest by one encoder."""
    captions = [
        manifest["empty_caption"],
        *(caption[0] for each in manifest["samples"] for caption in each["captions"]),
    ]
    return {
        caption["text"]: from_raw(
            get_tensor(trainer.store, ParseDict(caption["embeddings"][encoder], TensorRef()))
        ).double()
        for caption in captions
    }


async def test_compact_takes_nothing_of_exact_and_tells_its_error(
    start_trainer: Any, real_flags: dict[str, Any], make_spec: Any
) -> None:
    trainer = await start_trainer(**real_flags)
    pictures = {"a.jpg": (picture(300, 200), "a kite"), "b.jpg": (picture(310, 200), "a kite over the sea")}
    await add_pictures(trainer, "kept", pictures)
    _, exact, told_of_exact = await prepare(trainer, make_spec("kept"))
    report, compact, told = await prepare(trainer, make_spec("kept", embedding_storage="compact"))
    assert report.num_images_cached == 2
    assert report.num_prompts_cached == 0
    for error in report.embedding_errors:
        before, after = (embeddings_of(trainer, manifest, error.encoder) for manifest in (exact, compact))
        errors = [float((after[text] - before[text]).norm() / before[text].norm()) for text in before]
        assert len(errors) == 3
        assert error.mean == pytest.approx(sum(errors) / 3, rel=1e-9)
        assert error.max == pytest.approx(max(errors), rel=1e-9)
        assert 0.002 < error.mean < error.max < 0.015
        assert f"{error.encoder} by {error.mean:.2%} on average, {error.max:.2%} at most" in told
    assert [error.encoder for error in report.embedding_errors] == ["llama", "t5"]
    assert "compact storage changes" not in told_of_exact
    references = compact["samples"][0]["captions"][0][0]["embeddings"]
    assert [references[name].get("encoding", "") for name in ("clip_l", "clip_g", "t5", "llama")] == [
        "",
        "",
        "int8-groups-32",
        "int8-groups-32",
    ]
    # Back to exact: the first manifest, bit for bit.
    again = await trainer.watch((await trainer.submit(make_spec("kept"))).job_id)
    assert not again[-1].snapshot.preparation.embedding_errors
    assert again[-1].snapshot.preparation.num_prompts_cached == 3


async def test_on_demand_encodes_no_caption_before_it_is_needed(
    start_trainer: Any, real_flags: dict[str, Any], make_spec: Any
) -> None:
    trainer = await start_trainer(**real_flags)
    await add_pictures(trainer, "later", {"a.jpg": (picture(300, 200), "a lighthouse that nobody has encoded")})
    texts = len(list(trainer.store.list("v1/text/")))
    report, manifest, _ = await prepare(trainer, make_spec("later", embedding_storage="on_demand"))
    assert manifest["samples"][0]["captions"] == [[{"text": "a lighthouse that nobody has encoded", "embeddings": {}}]]
    assert sorted(manifest["empty_caption"]["embeddings"]) == sorted(manifest["encoders"])
    assert report.num_prompts == 2
    # The empty caption alone, which another job may have had encoded before.
    assert len(list(trainer.store.list("v1/text/"))) in (texts, texts + 8)
    assert not list(trainer.store.list("v1/on_demand/"))
