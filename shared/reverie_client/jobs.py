"""Training jobs: submit, follow, fetch."""

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import grpc
from reverie.training.v1 import training_pb2 as pb
from reverie.training.v1.job_pb2 import (
    Checkpoint,
    StepMetrics,
    TrainingJob,
    TrainingJobEvent,
    TrainingJobSpec,
    TrainingJobState,
    ValidationImage,
)
from reverie.training.v1.measures_pb2 import EvaluationResult
from reverie.training.v1.training_pb2_grpc import TrainingServiceStub
from reverie_common.errors import ReverieError, UnavailableError

from reverie_client.calls import Backoff, CallPolicy, all_pages, call, new_request_id, resumable_error
from reverie_client.errors import JobFailedError, UrlExpiredError
from reverie_client.transfer import Download, OnProgress, Transfers, ignore_progress

RESTING = frozenset(
    {
        TrainingJobState.TRAINING_JOB_STATE_SUCCEEDED,
        TrainingJobState.TRAINING_JOB_STATE_FAILED,
        TrainingJobState.TRAINING_JOB_STATE_CANCELLED,
    }
)
OnEvent = Callable[[TrainingJobEvent], None]


def is_resting(job: TrainingJob) -> bool:
    """Tell whether nothing more happens to a job by itself."""
    return job.state in RESTING


def is_last(event: TrainingJobEvent) -> bool:
    """Tell whether an event is a snapshot of a job at rest, after which a watch may end."""
    return event.HasField("snapshot") and is_resting(event.snapshot)


def resumable_end(job_id: str) -> ReverieError:
    """Say that a watch ended too early, as when the trainer stops."""
    return UnavailableError(f"the trainer ended the watch of job {job_id} before the job came to rest")


class Jobs:
    """`reverie.jobs`: every RPC of TrainingService."""

    def __init__(self, channel: grpc.aio.Channel, policy: CallPolicy) -> None:
        """Call the TrainingService behind `channel`."""
        self._stub = TrainingServiceStub(channel)
        self._policy = policy

    async def check(self, spec: TrainingJobSpec) -> pb.CheckTrainingJobResponse:
        """Return the job with its defaults, every violation, and what it would take. Changes nothing."""
        return await call(self._stub.CheckTrainingJob, pb.CheckTrainingJobRequest(spec=spec), self._policy)

    async def submit(self, spec: TrainingJobSpec, *, request_id: str | None = None) -> TrainingJob:
        """Submit a job and return it at once.

        Raises InvalidArgumentError with every violation, AlreadyExistsError for a used request_id with another spec.
        """
        request = pb.CreateTrainingJobRequest(spec=spec, request_id=new_request_id(request_id))
        return (await call(self._stub.CreateTrainingJob, request, self._policy)).job

    async def get(self, job_id: str) -> TrainingJob:
        """Return one job. Raises NotFoundError."""
        return (await call(self._stub.GetTrainingJob, pb.GetTrainingJobRequest(job_id=job_id), self._policy)).job

    async def list(
        self, *, states: Sequence["TrainingJobState.ValueType"] = (), limit: int | None = None
    ) -> tuple[TrainingJob, ...]:
        """Return jobs, newest first: those in `states`, or all; at most `limit`."""

        async def page(token: str) -> pb.ListTrainingJobsResponse:
            request = pb.ListTrainingJobsRequest(page_token=token, page_size=min(limit or 100, 100), states=states)
            return await call(self._stub.ListTrainingJobs, request, self._policy)

        return await all_pages(page, lambda found: found.jobs, limit)

    async def cancel(self, job_id: str, *, request_id: str | None = None) -> TrainingJob:
        """Stop a job; what it has saved stays. Raises FailedPreconditionError for a job at rest."""
        request = pb.CancelTrainingJobRequest(job_id=job_id, request_id=new_request_id(request_id))
        return (await call(self._stub.CancelTrainingJob, request, self._policy)).job

    async def resume(self, job_id: str, *, step: int = 0, request_id: str | None = None) -> TrainingJob:
        """Take up a CANCELLED or FAILED job from its checkpoint of a step, 0 for the newest, and forget later ones."""
        request = pb.ResumeTrainingJobRequest(job_id=job_id, step=step, request_id=new_request_id(request_id))
        return (await call(self._stub.ResumeTrainingJob, request, self._policy)).job

    async def fork(
        self,
        job_id: str,
        *,
        step: int = 0,
        adapter_only: bool = False,
        spec: TrainingJobSpec | None = None,
        request_id: str | None = None,
    ) -> TrainingJob:
        """Submit a new job that begins at a checkpoint of another one, 0 for the newest.

        `spec` is the new job, None takes the other one's. With `adapter_only` it begins at step 0 with a fresh
        optimiser, otherwise it goes on exactly. Raises InvalidArgumentError with every violation.
        """
        request = pb.ForkTrainingJobRequest(
            job_id=job_id, step=step, adapter_only=adapter_only, spec=spec, request_id=new_request_id(request_id)
        )
        return (await call(self._stub.ForkTrainingJob, request, self._policy)).job

    async def request_validation(self, job_id: str, *, request_id: str | None = None) -> TrainingJob:
        """Have the pictures of a job in training drawn after the step that it is at.

        Raises FailedPreconditionError for a job that is not in training or has no validation.
        """
        request = pb.RequestValidationRequest(job_id=job_id, request_id=new_request_id(request_id))
        return (await call(self._stub.RequestValidation, request, self._policy)).job

    async def watch(self, job_id: str, *, after_sequence: int = 0) -> AsyncIterator[TrainingJobEvent]:
        """Yield a snapshot, then every event after a sequence number, and a snapshot last once the job rests.

        A trainer that goes away and comes back is waited for, and no event is lost or repeated; each new connection
        yields a snapshot. Raises NotFoundError, UnavailableError after `policy.watch_patience_seconds` of silence.
        """
        cursor = after_sequence
        backoff = Backoff(self._policy.watch_patience_seconds)
        while True:
            request = pb.WatchTrainingJobRequest(job_id=job_id, after_sequence=cursor)
            has_ended = False
            try:
                async for response in self._stub.WatchTrainingJob(request, timeout=self._policy.stream_timeout_seconds):
                    backoff.restart()
                    has_ended = is_last(response.event)
                    if not response.event.HasField("snapshot"):
                        cursor = response.event.sequence
                    yield response.event
                if has_ended:
                    return
                lost = resumable_end(job_id)
            except grpc.aio.AioRpcError as error:
                lost = resumable_error(error)
            await backoff.pause(lost)

    async def wait(self, job_id: str, *, on_event: OnEvent | None = None) -> TrainingJob:
        """Follow a job until it rests and return it, whatever its state; `on_event` sees every event."""
        async for event in self.watch(job_id):
            if on_event is not None:
                on_event(event)
        return await self.get(job_id)

    async def result(self, job_id: str, *, on_event: OnEvent | None = None) -> TrainingJob:
        """Follow a job until it has SUCCEEDED and return it. Raises JobFailedError otherwise."""
        job = await self.wait(job_id, on_event=on_event)
        if job.state != TrainingJobState.TRAINING_JOB_STATE_SUCCEEDED:
            raise JobFailedError(job)
        return job

    async def checkpoints(self, job_id: str, *, limit: int | None = None) -> tuple[Checkpoint, ...]:
        """Return a job's checkpoints, newest first."""

        async def page(token: str) -> pb.ListCheckpointsResponse:
            request = pb.ListCheckpointsRequest(job_id=job_id, page_token=token, page_size=100)
            return await call(self._stub.ListCheckpoints, request, self._policy)

        return await all_pages(page, lambda found: found.checkpoints, limit)

    async def artifacts(self, job_id: str) -> tuple[pb.Artifact, ...]:
        """Return the files that a job made, with URLs that are valid for an hour."""

        async def page(token: str) -> pb.ListArtifactsResponse:
            request = pb.ListArtifactsRequest(job_id=job_id, page_token=token, page_size=100)
            return await call(self._stub.ListArtifacts, request, self._policy)

        return await all_pages(page, lambda found: found.artifacts, None)

    async def metrics(self, job_id: str) -> tuple[StepMetrics, ...]:
        """Return the figures of every step so far, each step once, in order; does not wait for a running job."""
        steps = {event.step.step: event.step async for event in self._history(job_id) if event.HasField("step")}
        return tuple(steps[step] for step in sorted(steps))

    async def validation_images(self, job_id: str) -> tuple[ValidationImage, ...]:
        """Return every picture so far, each once, in the order in which they were drawn, with its CLIP score."""
        found: dict[tuple[object, ...], ValidationImage] = {}
        async for event in self._history(job_id):
            if event.HasField("validation_image"):
                image = event.validation_image
                size = (image.width, image.height)
                found[(image.step, image.weights, image.prompt_name, size, image.image_index)] = image
        return tuple(found.values())

    async def evaluations(self, job_id: str) -> tuple[EvaluationResult, ...]:
        """Return every evaluation loss so far with its curve by timestep, each once, in order."""
        found: dict[tuple[int, str, str], EvaluationResult] = {}
        async for event in self._history(job_id):
            if event.HasField("evaluation"):
                result = event.evaluation
                found[(result.step, result.dataset, result.weights)] = result
        return tuple(found[key] for key in sorted(found))

    async def _history(self, job_id: str) -> AsyncIterator[TrainingJobEvent]:
        """Yield what has happened so far; does not wait for a running job."""
        last = (await self.get(job_id)).last_sequence
        async for event in self.watch(job_id):
            yield event
            if not event.HasField("snapshot") and event.sequence >= last:
                return

    async def fetch(self, job_id: str, folder: Path, *, on_progress: OnProgress = ignore_progress) -> tuple[Path, ...]:
        """Download every file that a job made into `folder`, under the artifact's path; returns the files.

        Files that are there already with the right digest are kept, half a file is continued. Raises IntegrityError,
        TransferError.
        """
        try:
            return await self._fetch_once(job_id, folder, on_progress)
        except UrlExpiredError:  # a long download outlives its URLs; what is done is kept
            return await self._fetch_once(job_id, folder, on_progress)

    async def _fetch_once(self, job_id: str, folder: Path, on_progress: OnProgress) -> tuple[Path, ...]:
        downloads = [
            Download(
                url=artifact.download_url,
                path=safe_path(folder, artifact.path),
                size_bytes=artifact.object.size_bytes,
                sha256=artifact.object.sha256,
            )
            for artifact in await self.artifacts(job_id)
        ]
        async with Transfers(on_progress) as transfers:
            await transfers.download(downloads)
        return tuple(download.path for download in downloads)


def safe_path(folder: Path, relative: str) -> Path:
    """Return `folder / relative`, refusing with ValueError what would leave the folder."""
    path = (folder / relative).resolve()
    if not relative or not path.is_relative_to(folder.resolve()):
        raise ValueError(f"the server named a file outside the folder: {relative!r}")
    return folder / relative
