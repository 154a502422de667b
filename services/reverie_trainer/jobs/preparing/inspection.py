"""Opening images: how large each is, or why it cannot be used; for preparation, checks and ScanDataset."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence

from reverie.common.v1 import common_pb2
from reverie.training.v1 import training_pb2
from reverie.vae.v1 import vae_pb2

from reverie_trainer.jobs.catalog.manifests import Sample
from reverie_trainer.jobs.preparing.patience import Notice, Patience, ask_in_chunks, tell_nobody
from reverie_trainer.jobs.preparing.services import VaeClient

_CHUNK = 32
_PARALLEL = 4

OnInspected = Callable[[int, vae_pb2.InspectImagesResponse], Awaitable[None]]


class ImageInspector:
    """Asks the VAE service to open images."""

    def __init__(self, vae: VaeClient, patience_seconds: float) -> None:
        self._vae = vae
        self._patience_seconds = patience_seconds

    async def inspect(
        self,
        images: Sequence[common_pb2.ObjectRef],
        on_inspected: OnInspected,
        notice: Notice = tell_nobody,
    ) -> None:
        """Open images and tell of each one as it is known; waits while the service is away.

        Raises:
            JobFailedError: it was away for too long.
        """
        patience = Patience(f"the vae service at {self._vae.address}", self._patience_seconds, notice)
        await ask_in_chunks(
            images, self._vae.inspect, on_inspected, patience=patience, chunk_size=_CHUNK, num_parallel=_PARALLEL
        )

    def stream(
        self, images: Sequence[common_pb2.ObjectRef]
    ) -> AsyncGenerator[tuple[int, vae_pb2.InspectImagesResponse], None]:
        """Yield (index, outcome) of at most 1024 images in one call, without waiting for a service that is away."""
        return self._vae.inspect(images)


async def scan(inspector: ImageInspector, samples: Sequence[Sample]) -> AsyncIterator[training_pb2.ScanDatasetResponse]:
    """Yield what was found in each sample, in any order."""
    num_done = 0
    for start in range(0, len(samples), _CHUNK):
        part = samples[start : start + _CHUNK]
        async for index, response in inspector.stream([sample.image for sample in part]):
            num_done += 1
            yield _scanned(part[index], response, num_done, len(samples))


def _scanned(
    sample: Sample, response: vae_pb2.InspectImagesResponse, num_done: int, num_total: int
) -> training_pb2.ScanDatasetResponse:
    problems = []
    if response.HasField("rejection"):
        problems.append(response.rejection.message)
    if not sample.captions:
        problems.append("it has no caption; add a .txt file beside it, or set instance_prompt in the job")
    return training_pb2.ScanDatasetResponse(
        sample=sample.name,
        width=response.image.width,
        height=response.image.height,
        problems=problems,
        num_done=num_done,
        num_total=num_total,
    )
