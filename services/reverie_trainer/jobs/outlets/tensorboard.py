"""TensorBoard event files, written by tensorboardX, which needs no torch."""

import asyncio
import hashlib
from pathlib import Path

from reverie.common.v1 import common_pb2
from reverie.training.v1 import job_pb2
from reverie_common.errors import ReverieError
from reverie_common.storage import ObjectStore, get_object, put_object
from reverie_common.storage.keys import artifact_key
from tensorboardX import SummaryWriter
from tensorboardX.proto.summary_pb2 import Summary

from reverie_trainer.jobs.outlets.job_files import JobFiles
from reverie_trainer.jobs.outlets.outlet import OutletFailedError
from reverie_trainer.jobs.outlets.series import scalars_of

MEDIA_TYPE = "application/vnd.tensorboard"


class TensorboardOutlet:
    """Writes one job's curves and pictures into a directory, and into the job's artifacts once it rests."""

    def __init__(self, directory: Path, store: ObjectStore, files: JobFiles) -> None:
        """A new file is begun in `directory`, beside those of earlier trainers; TensorBoard reads them as one run."""
        self._directory = directory
        self._store = store
        self._writer = SummaryWriter(str(directory))
        self._files = files

    async def tell(self, event: job_pb2.TrainingJobEvent, job: job_pb2.TrainingJob) -> bool:
        """See Outlet."""
        del job
        step, values = scalars_of(event)
        time = event.time.ToNanoseconds() / 1e9
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=time)
        if event.HasField("validation_image"):
            await self._add_picture(event.validation_image, time)
        return False

    async def finish(self, job: job_pb2.TrainingJob) -> None:
        """See Outlet."""
        await asyncio.to_thread(self._writer.flush)
        try:
            await self._files.put(job.job_id, await asyncio.to_thread(self._upload, job.job_id))
        except ReverieError as error:
            raise OutletFailedError(
                message=f"the event files stay in {self._directory} on the trainer's machine: {error.message}"
            ) from error

    async def close(self) -> None:
        """See Outlet."""
        await asyncio.to_thread(self._writer.close)

    async def _add_picture(self, picture: job_pb2.ValidationImage, time: float) -> None:
        try:
            body = await asyncio.to_thread(get_object, self._store, picture.image)
        except ReverieError as error:
            raise OutletFailedError(
                message=f"picture {picture.prompt_name} of step {picture.step} could not be read: {error.message}"
            ) from error
        suffix = "/ema" if picture.weights == "ema" else ""
        tag = f"{picture.prompt_name} - ({picture.width}, {picture.height})/{picture.image_index}{suffix}"
        # The PNG as it is: the library's own add_image would decode it and encode it again.
        image = Summary.Image(height=picture.height, width=picture.width, colorspace=3, encoded_image_string=body)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._writer.file_writer.add_summary(summary, picture.step, walltime=time)

    def _upload(self, job_id: str) -> dict[str, common_pb2.ObjectRef]:
        files = {}
        for file in sorted(self._directory.glob("events.out.tfevents.*")):
            body = file.read_bytes()
            name = f"tracking/tensorboard/{file.name}"
            key = artifact_key(job_id, name, hashlib.sha256(body).hexdigest())
            files[name] = put_object(self._store, key, body, MEDIA_TYPE)
        return files
