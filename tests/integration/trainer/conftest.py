"""A trainer on real sockets and a real store, with small encoder, VAE and worker stand-ins that speak the contract."""

# ruff: noqa: N802 - the contract names the methods of the stand-ins

import asyncio
import contextlib
import hashlib
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest
from pydantic import SecretStr
from reverie.common.v1 import common_pb2
from reverie.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from reverie.training.v1 import job_pb2, training_pb2, training_pb2_grpc
from reverie.vae.v1 import vae_pb2, vae_pb2_grpc
from reverie_common.errors import FailedPreconditionError, ReverieError
from reverie_common.rpc.channel import connect
from reverie_common.rpc.server import ServedService, Server
from reverie_common.settings import ServerSettings
from reverie_common.storage import S3Store
from reverie_common.storage.keys import image_key
from reverie_common.storage.seaweed import Seaweed
from reverie_trainer.app import make_server
from reverie_trainer.settings import TrainerSettings

ENCODERS = (
    encoder_pb2.ENCODER_CLIP_L,
    encoder_pb2.ENCODER_CLIP_G,
    encoder_pb2.ENCODER_T5,
    encoder_pb2.ENCODER_LLAMA,
)
MAX_WORDS = 12

TINY_CONFIG = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "caption_channels": [48, 64],
    "text_emb_dim": 80,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": [8, 4, 4],
    "max_resolution": [32, 32],
    "llama_layers": [0, 1, 2, 2],
}


class FakeEncoder(encoder_pb2_grpc.EncoderServiceServicer):
    """Answers with references to nothing; a prompt of more than twelve words counts as cut."""

    def __init__(self, encoders: Sequence[encoder_pb2.Encoder.ValueType] = ENCODERS) -> None:
        self.encoders = tuple(encoders)
        self.encoded: list[str] = []
        self.known: set[str] = set()
        self.errors: list[ReverieError] = []
        self.answers_before_error = 0
        self.num_describes = 0
        self.log: list[str] = []
        self.is_busy = False
        self.precisions: list[str] = []

    async def ReleaseMemory(
        self, request: encoder_pb2.ReleaseMemoryRequest, context: Any
    ) -> encoder_pb2.ReleaseMemoryResponse:
        """See the contract."""
        self.log.append("encoder released")
        return encoder_pb2.ReleaseMemoryResponse(released=not self.is_busy)

    async def DescribeEncoders(self, request: Any, context: Any) -> encoder_pb2.DescribeEncodersResponse:
        """See the contract."""
        self.num_describes += 1
        precision = self.precisions.pop(0) if self.precisions else "no_change"
        return encoder_pb2.DescribeEncodersResponse(
            encoders=[
                encoder_pb2.EncoderDescription(
                    encoder=encoder,
                    fingerprint=f"encoder-{encoder}",
                    precision=precision,
                    max_length=MAX_WORDS,
                    shape=[4, 8],
                    dtype="BF16",
                )
                for encoder in self.encoders
            ]
        )

    async def EncodePrompts(
        self, request: encoder_pb2.EncodePromptsRequest, context: Any
    ) -> AsyncIterator[encoder_pb2.EncodePromptsResponse]:
        """See the contract."""
        error = self.errors.pop(0) if self.errors else None
        for index, prompt in enumerate(request.prompts):
            if error is not None and index >= self.answers_before_error:
                raise error
            self.encoded.append(prompt)
            self.log.append("prompt encoded")
            yield self._response(index, prompt, request.encoders or self.encoders)
            self.known.add(prompt)

    def _response(self, index: int, prompt: str, encoders: Any) -> encoder_pb2.EncodePromptsResponse:
        words = prompt.split()
        digest = hashlib.sha256(prompt.encode()).hexdigest()
        return encoder_pb2.EncodePromptsResponse(
            prompt_index=index,
            embeddings=[
                encoder_pb2.Embedding(
                    encoder=encoder,
                    tensor=common_pb2.TensorRef(uri=f"s3://b/{encoder}/{digest}", name="x", dtype="BF16", shape=[4, 8]),
                    cached=prompt in self.known,
                    num_tokens=len(words),
                    dropped_text=" ".join(words[MAX_WORDS:]),
                )
                for encoder in encoders
            ],
        )


class FakeVae(vae_pb2_grpc.VaeServiceServicer):
    """Takes objects that say `640x480` for images of that size, everything else for broken ones."""

    def __init__(self, store: S3Store) -> None:
        self.store = store
        self.plans: list[vae_pb2.ImagePlan] = []
        self.mask_plans: list[vae_pb2.ImagePlan] = []
        self.known: set[bytes] = set()
        self.num_inspected = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.log: list[str] = []

    async def ReleaseMemory(self, request: vae_pb2.ReleaseMemoryRequest, context: Any) -> vae_pb2.ReleaseMemoryResponse:
        """See the contract."""
        self.log.append("vae released")
        return vae_pb2.ReleaseMemoryResponse(released=True)

    async def DescribeVae(self, request: Any, context: Any) -> vae_pb2.DescribeVaeResponse:
        """See the contract."""
        return vae_pb2.DescribeVaeResponse(fingerprint="vae", dtype="float32")

    async def PreviewLatents(
        self, request: vae_pb2.PreviewLatentsRequest, context: Any
    ) -> vae_pb2.PreviewLatentsResponse:
        """See the contract; this stand-in has no tiny decoder."""
        raise FailedPreconditionError("no tiny decoder", reason="NO_PREVIEW_DECODER")

    async def InspectImages(
        self, request: vae_pb2.InspectImagesRequest, context: Any
    ) -> AsyncIterator[vae_pb2.InspectImagesResponse]:
        """See the contract."""
        await self.may_answer.wait()
        for index, image in enumerate(request.images):
            self.num_inspected += 1
            size = await asyncio.to_thread(self._size, image)
            if size is None:
                yield vae_pb2.InspectImagesResponse(image_index=index, rejection=REJECTION)
            else:
                description = vae_pb2.ImageDescription(width=size[0], height=size[1], format="PNG")
                yield vae_pb2.InspectImagesResponse(image_index=index, image=description)

    async def EncodeImages(
        self, request: vae_pb2.EncodeImagesRequest, context: Any
    ) -> AsyncIterator[vae_pb2.EncodeImagesResponse]:
        """See the contract."""
        for index, plan in enumerate(request.images):
            key = plan.SerializeToString(deterministic=True)
            self.plans.append(plan)
            self.log.append("image encoded")
            tensor = common_pb2.TensorRef(
                uri=f"s3://b/{plan.image.sha256}", shape=[2, 16, plan.height // 8, plan.width // 8]
            )
            yield vae_pb2.EncodeImagesResponse(
                image_index=index, moments=vae_pb2.LatentMoments(tensor=tensor), cached=key in self.known
            )
            self.known.add(key)

    async def EncodeMasks(
        self, request: vae_pb2.EncodeMasksRequest, context: Any
    ) -> AsyncIterator[vae_pb2.EncodeMasksResponse]:
        """See the contract; a mask that says nothing of its size is broken."""
        for index, plan in enumerate(request.masks):
            self.mask_plans.append(plan)
            if await asyncio.to_thread(self._size, plan.image) is None:
                yield vae_pb2.EncodeMasksResponse(mask_index=index, rejection=REJECTION)
            else:
                mask = common_pb2.TensorRef(
                    uri=f"s3://b/mask/{plan.image.sha256}", shape=[1, plan.height // 8, plan.width // 8]
                )
                yield vae_pb2.EncodeMasksResponse(mask_index=index, mask=mask)

    async def DecodeLatents(self, request: Any, context: Any) -> vae_pb2.DecodeLatentsResponse:
        """Nobody here asks for pictures."""
        raise AssertionError("preparation decodes nothing")

    def _size(self, image: common_pb2.ObjectRef) -> tuple[int, int] | None:
        store = self.store.sibling(image.uri.split("/")[2])
        text = store.get(store.key_of(image.uri)).decode().partition(" ")[0]
        width, _, height = text.partition("x")
        return (int(width), int(height)) if width.isdigit() and height.isdigit() else None


REJECTION = vae_pb2.ImageRejection(
    reason=vae_pb2.REJECTION_REASON_CORRUPT, message="the file ends early; export it again"
)


@dataclass(kw_only=True)
class Neighbours:
    """The services that a trainer asks."""

    encoder: FakeEncoder
    vae: FakeVae
    encoder_server: Server
    vae_server: Server

    @property
    def flags(self) -> dict[str, Any]:
        """Settings with which a trainer finds them."""
        return {"encoders": (self.encoder_server.target,), "vae": self.vae_server.target}


@dataclass(kw_only=True)
class RunningTrainer:
    """A trainer that serves, and stubs to call it."""

    target: str
    store: S3Store
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    def __post_init__(self) -> None:
        self.channel = connect(self.target)
        self.stack.push_async_callback(self.channel.close)
        self.training: training_pb2_grpc.TrainingServiceAsyncStub = training_pb2_grpc.TrainingServiceStub(self.channel)
        self.datasets: training_pb2_grpc.DatasetServiceAsyncStub = training_pb2_grpc.DatasetServiceStub(self.channel)
        self.workers: training_pb2_grpc.WorkerServiceAsyncStub = training_pb2_grpc.WorkerServiceStub(self.channel)

    def put_image(self, body: str) -> common_pb2.ObjectRef:
        """Store a stand-in for an image and refer to it."""
        return self.put_bytes(body.encode())

    def put_bytes(self, data: bytes) -> common_pb2.ObjectRef:
        """Store an image file and refer to it."""
        digest = hashlib.sha256(data).hexdigest()
        self.store.create(image_key(digest), data)
        return common_pb2.ObjectRef(uri=self.store.uri(image_key(digest)), size_bytes=len(data), sha256=digest)

    async def add_dataset(self, name: str, samples: Sequence[tuple[str, Sequence[str]]]) -> training_pb2.Dataset:
        """Create a dataset of (image content, captions)."""
        await self.datasets.CreateDataset(training_pb2.CreateDatasetRequest(name=name))
        messages = [
            training_pb2.Sample(name=f"{index:03}.png", image=self.put_image(body), captions=captions)
            for index, (body, captions) in enumerate(samples)
        ]
        request = training_pb2.AddSamplesRequest(dataset=name, request_id=str(uuid.uuid4()), samples=messages)
        return (await self.datasets.AddSamples(iter([request]))).dataset

    async def submit(self, spec: job_pb2.TrainingJobSpec, request_id: str = "") -> job_pb2.TrainingJob:
        """Create a job."""
        request = training_pb2.CreateTrainingJobRequest(spec=spec, request_id=request_id)
        return (await self.training.CreateTrainingJob(request)).job

    async def get(self, job_id: str) -> job_pb2.TrainingJob:
        """Get a job."""
        return (await self.training.GetTrainingJob(training_pb2.GetTrainingJobRequest(job_id=job_id))).job

    async def watch(self, job_id: str, after_sequence: int = 0) -> list[job_pb2.TrainingJobEvent]:
        """Follow a job to its end."""
        request = training_pb2.WatchTrainingJobRequest(job_id=job_id, after_sequence=after_sequence)
        return [response.event async for response in self._watch(request)]

    def _watch(self, request: training_pb2.WatchTrainingJobRequest) -> Any:
        # A trainer that was just started again on its old port: gRPC remembers for a while that nobody was there.
        return self.training.WatchTrainingJob(request, timeout=30, wait_for_ready=True)

    async def finish(self, job_id: str) -> job_pb2.TrainingJob:
        """Follow a job to its end and return it as it rests."""
        return (await self.watch(job_id))[-1].snapshot

    async def until(self, job_id: str, is_reached: Callable[[job_pb2.TrainingJob], bool]) -> job_pb2.TrainingJob:
        """Wait until a job is as wanted."""

        async def get() -> job_pb2.TrainingJob | None:
            job = await self.get(job_id)
            return job if is_reached(job) else None

        job: job_pb2.TrainingJob = await eventually(get)
        return job


async def eventually(get: Callable[[], Awaitable[Any]], timeout_seconds: float = 20.0) -> Any:
    """Ask again until there is an answer."""
    async with asyncio.timeout(timeout_seconds):
        while (answer := await get()) is None:  # noqa: ASYNC110 - what is waited for is in another process
            await asyncio.sleep(0.02)
    return answer


class StartTrainer(Protocol):
    """Starts a trainer in this process, with settings of its own."""

    def __call__(self, **overrides: Any) -> Awaitable[RunningTrainer]:
        """Return the trainer once it serves."""
        ...


@pytest.fixture(scope="session")
def tiny_transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of which only the transformer's configuration is there: all that the control plane reads."""
    directory = tmp_path_factory.mktemp("tiny-transformer")
    (directory / "transformer").mkdir()
    (directory / "transformer" / "config.json").write_text(json.dumps(TINY_CONFIG))
    return directory


@asynccontextmanager
async def serve(name: str, add: Any, servicer: Any) -> AsyncIterator[Server]:
    """Serve one stand-in on a free port."""
    service = ServedService(name=name, add_to_server=add, servicer=servicer)
    async with Server([service], ServerSettings(grace_seconds=0.0)) as server:
        yield server


@pytest.fixture
def fake_encoder() -> FakeEncoder:
    """The stand-in for the encoder service; a test may change how it behaves."""
    return FakeEncoder()


@pytest.fixture
async def neighbours(module_s3_store: S3Store, fake_encoder: FakeEncoder) -> AsyncIterator[Neighbours]:
    """Stand-ins for the encoder and the VAE, serving."""
    vae = FakeVae(module_s3_store)
    add = vae_pb2_grpc.add_VaeServiceServicer_to_server
    async with (
        serve_fake_encoder(fake_encoder) as encoder_server,
        serve("reverie.vae.v1.VaeService", add, vae) as vae_server,
    ):
        yield Neighbours(encoder=fake_encoder, vae=vae, encoder_server=encoder_server, vae_server=vae_server)


@pytest.fixture
async def serve_encoder() -> AsyncIterator[Callable[..., Awaitable[tuple[FakeEncoder, str]]]]:
    """Serves further stand-ins for the encoder service, with the encoders that a test names."""
    async with AsyncExitStack() as stack:

        async def start(encoders: Sequence[encoder_pb2.Encoder.ValueType]) -> tuple[FakeEncoder, str]:
            encoder = FakeEncoder(encoders)
            server = await stack.enter_async_context(serve_fake_encoder(encoder))
            return encoder, server.target

        yield start


def serve_fake_encoder(encoder: FakeEncoder) -> AbstractAsyncContextManager[Server]:
    """Serve a stand-in for the encoder service."""
    add = encoder_pb2_grpc.add_EncoderServiceServicer_to_server
    return serve("reverie.encoder.v1.EncoderService", add, encoder)


@pytest.fixture
def worker_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes import the stand-in for the worker."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture
def trainer_flags(
    neighbours: Neighbours, seaweed: Seaweed, module_s3_store: S3Store, tiny_transformer: Path, tmp_path: Path
) -> dict[str, Any]:
    """Settings of a trainer for tests."""
    return {
        "port": 0,
        "metrics_port": 0,
        "grace_seconds": 0.0,
        "checkpoint": str(tiny_transformer),
        "state_dir": tmp_path / "state",
        "store_endpoint": seaweed.endpoint,
        "store_bucket": module_s3_store.bucket,
        "store_access_key": SecretStr(seaweed.access_key),
        "store_secret_key": SecretStr(seaweed.secret_key),
        "worker_module": "fake_worker",
        "standby_workers": 0,
        "tick_seconds": 0.05,
        "worker_stop_seconds": 3.0,
        "progress_seconds": 0.0,
        **neighbours.flags,
    }


@pytest.fixture
async def start_trainer(
    trainer_flags: dict[str, Any], module_s3_store: S3Store, worker_path: None
) -> AsyncIterator[StartTrainer]:
    """Starts trainers in this process and stops them after the test."""
    async with AsyncExitStack() as stack:

        async def start(**overrides: Any) -> RunningTrainer:
            server = await make_server(TrainerSettings(**{**trainer_flags, **overrides}))
            await stack.enter_async_context(server)
            trainer = RunningTrainer(target=server.target, store=module_s3_store)
            await stack.enter_async_context(trainer.stack)
            return trainer

        yield start


@pytest.fixture
async def connect_trainer(module_s3_store: S3Store) -> AsyncIterator[Callable[[str], Awaitable[RunningTrainer]]]:
    """Connects to trainers that run elsewhere."""
    async with AsyncExitStack() as stack:

        async def connect_to(target: str) -> RunningTrainer:
            trainer = RunningTrainer(target=target, store=module_s3_store)
            await stack.enter_async_context(trainer.stack)
            return trainer

        yield connect_to


@pytest.fixture
async def trainer(start_trainer: StartTrainer) -> RunningTrainer:
    """A trainer in this process."""
    return await start_trainer()


MakeSpec = Callable[..., job_pb2.TrainingJobSpec]


@pytest.fixture
def make_spec() -> MakeSpec:
    """Makes a small valid job on one dataset; trigger words say how the stand-in for the worker behaves."""

    def make(dataset: str = "cats", *words: str, **overrides: Any) -> job_pb2.TrainingJobSpec:
        spec = job_pb2.TrainingJobSpec(
            name="cats",
            datasets=[job_pb2.DatasetSpec(dataset=dataset, resolution=256)],
            adapter=job_pb2.AdapterSpec(lokr=job_pb2.LokrSpec()),
            optimization=job_pb2.OptimizationSpec(max_steps=3),
            trigger_words=words,
        )
        spec.MergeFrom(job_pb2.TrainingJobSpec(**overrides))
        return spec

    return make


class WorkerPids:
    """Finds the processes that stand in for workers of this test's trainer."""

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir

    def __call__(self, job_id: str) -> list[int]:
        """Process ids of the workers of a job, by the log that they write."""
        return self._writing_to(f"{job_id}.")

    async def standby(self) -> int:
        """Process id of the worker that waits for a job."""

        async def get() -> int | None:
            return next(iter(self._writing_to("standby.")), None)

        pid: int = await eventually(get)
        return pid

    async def gone(self, job_id: str) -> None:
        """Wait until a job has no worker any more."""

        async def get() -> bool | None:
            return None if self(job_id) else True

        await eventually(get)

    def _writing_to(self, prefix: str) -> list[int]:
        found = []
        for process in psutil.process_iter(["pid"]):
            with contextlib.suppress(psutil.Error, OSError):
                log = Path(f"/proc/{process.pid}/fd/2").readlink()
                if log.parent == self._log_dir and log.name.startswith(prefix):
                    found.append(process.pid)
        return found


@pytest.fixture
def worker_pids(tmp_path: Path) -> WorkerPids:
    """Finds the processes that stand in for workers of this test's trainer."""
    return WorkerPids(tmp_path / "state" / "workers")


@pytest.fixture
def worker_token(tmp_path: Path) -> Callable[[str], Awaitable[str]]:
    """Reads the secret that the idle stand-in for the worker wrote to its log."""

    async def read(job_id: str) -> str:
        log = tmp_path / "state" / "workers" / f"{job_id}.1.log"

        async def get() -> str | None:
            text = log.read_text() if log.is_file() else ""
            return text.split()[1] if text.endswith("\n") else None

        token: str = await eventually(get)
        return token

    return read
