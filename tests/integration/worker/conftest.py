"""A recording trainer behind a real socket, and jobs prepared on the tiny checkpoint."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf.json_format import MessageToDict, ParseDict
from pydantic import SecretStr
from reverie.common.v1.common_pb2 import ObjectRef, TensorRef
from reverie.training.v1 import training_pb2
from reverie.training.v1.job_pb2 import TrainingJob, TrainingJobEvent, TrainingJobSpec
from reverie.training.v1.training_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server
from reverie_common.errors import AbortedError, UnavailableError
from reverie_common.rpc.server import ServedService, Server
from reverie_common.settings import ServerSettings
from reverie_common.storage import ObjectStore, put_object, put_tensor
from reverie_common.storage.keys import latent_key, prepared_key, text_key
from reverie_common.storage.seaweed import Seaweed
from reverie_hidream.tensor_io import to_raw
from reverie_hidream.text import ENCODER_NAMES, load_text_encoder
from reverie_hidream.vae import load_vae
from reverie_trainer.worker.orders import Orders
from reverie_trainer.worker.run import run_worker
from reverie_trainer.worker.settings import WorkerSettings

SIZES = ((128, 128), (128, 192), (128, 128), (192, 128))
CAPTIONS = ("a red circle", "a blue square on grey", "a small cat", "two cups of coffee")


class RecordingTrainer(WorkerServiceServicer):
    """Leases one job and remembers what it is told."""

    def __init__(self, job: TrainingJob, prepared: ObjectRef, checkpoint: ObjectRef | None = None) -> None:
        self.job = job
        self.prepared = prepared
        self.checkpoint = checkpoint
        self.leases: list[training_pb2.LeaseJobRequest] = []
        self.events: list[TrainingJobEvent] = []
        self.phases: dict[str, float] = {}
        self.adapter_reports: list[tuple[int, int]] = []
        self.completions: list[training_pb2.CompleteJobRequest] = []
        self.on_event: Callable[[TrainingJobEvent], None] = lambda _: None
        self.should_stop = False
        self.is_lost = False
        self.num_refusals = 0
        self._sequences: set[tuple[str, int]] = set()

    async def LeaseJob(  # noqa: N802 - gRPC's name
        self, request: training_pb2.LeaseJobRequest, context: Any
    ) -> training_pb2.LeaseJobResponse:
        self.leases.append(request)
        job = TrainingJob()
        job.CopyFrom(self.job)
        job.step = max((event.step.step for event in self.events), default=self.job.step)
        return training_pb2.LeaseJobResponse(
            lease_id=f"lease-{len(self.leases)}",
            job=job,
            prepared=self.prepared,
            checkpoint=self.checkpoint,
            lease_seconds=30.0,
        )

    async def ReportProgress(  # noqa: N802 - gRPC's name
        self, request: training_pb2.ReportProgressRequest, context: Any
    ) -> training_pb2.ReportProgressResponse:
        self._refuse_if_asked()
        identity = (request.lease_id, request.report_sequence)
        if identity not in self._sequences:
            self._sequences.add(identity)
            self._record(request)
        return training_pb2.ReportProgressResponse(should_stop=self.should_stop)

    async def CompleteJob(  # noqa: N802 - gRPC's name
        self, request: training_pb2.CompleteJobRequest, context: Any
    ) -> training_pb2.CompleteJobResponse:
        self._refuse_if_asked()
        self.completions.append(request)
        return training_pb2.CompleteJobResponse()

    def of_kind(self, kind: str) -> list[Any]:
        """Payloads of the events of one kind."""
        return [getattr(event, kind) for event in self.events if event.WhichOneof("payload") == kind]

    def losses(self) -> dict[int, float]:
        """Loss by step."""
        return {figures.step: figures.loss for figures in self.of_kind("step")}

    def notices(self) -> list[str]:
        """Reasons of the notices."""
        return [notice.reason for notice in self.of_kind("notice")]

    def _record(self, request: training_pb2.ReportProgressRequest) -> None:
        for event in request.events:
            self.events.append(event)
            self.on_event(event)
        for phase in request.phases:
            self.phases[phase.name] = self.phases.get(phase.name, 0.0) + phase.seconds
        if request.HasField("adapter_report"):
            report = request.adapter_report
            self.adapter_reports.append((report.num_modules, report.num_parameters))

    def _refuse_if_asked(self) -> None:
        if self.is_lost:
            raise AbortedError("the lease was given to another worker", reason="LEASE_LOST")
        if self.num_refusals:
            self.num_refusals -= 1
            raise UnavailableError("restarting")


class LoopThread:
    """An event loop in a thread: servers run there while the test's own thread trains."""

    def __init__(self) -> None:
        self._left_serving: list[Server] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine there and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    @contextmanager
    def serving(self, service: ServedService, port: int = 0) -> Iterator[str]:
        """Serve one service; yields `host:port`."""
        server = Server([service], ServerSettings(port=port))
        self.run(server.__aenter__())
        try:
            yield server.target
        finally:
            self.run(server.__aexit__(None, None, None))

    async def serve(self, service: ServedService, port: int) -> Server:
        """Serve one service until the loop is closed; to be called in the loop."""
        server = Server([service], ServerSettings(port=port))
        self._left_serving.append(await server.__aenter__())
        return server

    def close(self) -> None:
        """Stop what still serves, and the loop."""
        for server in self._left_serving:
            self.run(server.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def loop_thread() -> Iterator[LoopThread]:
    """An event loop in a thread."""
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture
def serve_trainer(loop_thread: LoopThread) -> Callable[..., Any]:
    """Context manager that serves a RecordingTrainer and yields its address."""

    def serve(trainer: RecordingTrainer, port: int = 0) -> Any:
        return loop_thread.serving(
            ServedService(
                name="reverie.training.v1.WorkerService",
                add_to_server=add_WorkerServiceServicer_to_server,
                servicer=trainer,
            ),
            port,
        )

    return serve


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What preparation leaves for the worker."""

    store: ObjectStore
    checkpoint: Path
    manifest: ObjectRef

    def trainer(self, checkpoint: ObjectRef | None = None, **changes: Any) -> RecordingTrainer:
        """A trainer with a small job on these data; changes are merged into its spec."""
        spec = ParseDict(_merge(SMALL_JOB, changes), TrainingJobSpec())
        job = TrainingJob(job_id=changes.get("name", "job-small"), spec=spec)
        return RecordingTrainer(job, self.manifest, checkpoint)


SOURCE: dict[str, Any] = {
    "dataset": "shapes",
    "role": "train",
    "repeats": 0,
    "probability": 1.0,
    "start_step": 0,
    "end_step": 0,
    "timestep_sampling_offset": 0.0,
    "mask_type": "none",
}

SMALL_JOB: dict[str, Any] = {
    "name": "small",
    "model": {"mixed_precision": "no"},
    "datasets": [{"dataset": "shapes", "resolution": 128}],
    "adapter": {"lokr": {"factor": 4, "use_scalar": True, "apply_preset": {"target_module": ["Attention"]}}},
    "optimization": {"max_steps": 6, "learning_rate": 0.01, "lr_warmup_steps": 2},
    "checkpoints": {"every_steps": 2},
    "trigger_words": ["shape"],
    "seed": "42",
}


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both_are_objects = isinstance(value, dict) and isinstance(base.get(key), dict) and key != "adapter"
        merged[key] = _merge(base[key], value) if both_are_objects else value
    return merged


@pytest.fixture(scope="module")
def prepared(tiny_checkpoint: Path, module_s3_store: ObjectStore) -> Prepared:
    """Four small images in three sizes, encoded as the services do."""
    texts = _encode_texts(tiny_checkpoint, module_s3_store, ("", *CAPTIONS))
    latents = _encode_images(tiny_checkpoint, module_s3_store)
    samples = [
        {
            "source": 0,
            "name": f"{index}.png",
            "width": width,
            "height": height,
            "image_sha256": f"{index:064x}",
            "latents": latents[index],
            "captions": [[texts[CAPTIONS[index]]], [texts[CAPTIONS[(index + 1) % len(CAPTIONS)]]]],
        }
        for index, (width, height) in enumerate(SIZES)
    ]
    manifest = {
        "format": 2,
        "datasets": [SOURCE],
        "samples": samples,
        "empty_caption": texts[""],
        "encoders": {},
        "buckets": [],
    }
    ref = put_object(module_s3_store, prepared_key("0" * 64), json.dumps(manifest).encode(), "application/json")
    return Prepared(store=module_s3_store, checkpoint=tiny_checkpoint, manifest=ref)


def _encode_texts(checkpoint: Path, store: ObjectStore, prompts: tuple[str, ...]) -> dict[str, Any]:
    entries: dict[str, Any] = {prompt: {"text": prompt, "embeddings": {}} for prompt in prompts}
    for name in ENCODER_NAMES:
        encoder = load_text_encoder(checkpoint, name, dtype=torch.float32)
        for index, (prompt, encoded) in enumerate(zip(prompts, encoder.encode(prompts), strict=True)):
            key = text_key(encoder.fingerprint, f"{index:064x}")
            ref = put_tensor(store, key, "embedding", to_raw(encoded.tensor), compressed=True)
            entries[prompt]["embeddings"][name] = _to_json(ref)
    return entries


def _encode_images(checkpoint: Path, store: ObjectStore) -> list[Any]:
    vae = load_vae(checkpoint, dtype=torch.float32)
    refs = []
    for index, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(index).uniform(-1, 1, (1, 3, height, width)).astype(np.float32)
        moments = vae.encode(torch.from_numpy(pixels))[0]
        key = latent_key(vae.fingerprint, f"{index:064x}")
        refs.append(_to_json(put_tensor(store, key, "moments", to_raw(moments), compressed=False)))
    return refs


def _to_json(ref: TensorRef) -> Any:
    return MessageToDict(ref, preserving_proto_field_name=True)


@pytest.fixture
def work(prepared: Prepared, serve_trainer: Callable[..., Any], seaweed: Seaweed) -> Callable[..., int]:
    """Run a worker in this thread for a trainer, until it ends."""

    def run(trainer: RecordingTrainer, **settings: Any) -> int:
        with serve_trainer(trainer) as address:
            defaults: dict[str, Any] = {
                "job_id": trainer.job.job_id,
                "trainer": address,
                "checkpoint": str(prepared.checkpoint),
                "device": "cpu",
                "store_endpoint": seaweed.endpoint,
                "store_bucket": prepared.store.bucket,
                "store_access_key": SecretStr(seaweed.access_key),
                "store_secret_key": SecretStr(seaweed.secret_key),
                "report_interval_seconds": 0.05,
            }
            worker_settings = WorkerSettings(**{**defaults, **settings})
            return run_worker(worker_settings, job_id=trainer.job.job_id, token="secret", orders=Orders())

    return run
