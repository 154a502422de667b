"""Weights & Biases, in a process of its own: the library starts servers and threads of its own."""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from reverie.training.v1 import job_pb2
from reverie_common.errors import ReverieError
from reverie_common.storage import ObjectStore, get_object

from reverie_trainer.jobs.outlets.outlet import OutletFailedError
from reverie_trainer.jobs.outlets.series import scalars_of

logger = logging.getLogger(__name__)

_FINISH_SECONDS = 120.0
_CLOSE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbRun:
    """What the process is told first."""

    run_id: str
    name: str
    project: str
    mode: str
    """`online` or `offline`."""
    directory: Path
    api_key: str | None

    def hello(self, job: job_pb2.TrainingJob) -> dict[str, Any]:
        """What goes into the process' standard input first; the key goes by the environment."""
        return {
            "id": self.run_id,
            "name": self.name,
            "project": self.project,
            "mode": self.mode,
            "directory": str(self.directory),
            "config": MessageToDict(job.spec, preserving_proto_field_name=True),
        }

    def environment(self) -> Mapping[str, str]:
        """The environment of the process."""
        own = {"WANDB_SILENT": "true", "WANDB_DISABLE_GIT": "true", "WANDB_DISABLE_CODE": "true"}
        return {**os.environ, **own, **({"WANDB_API_KEY": self.api_key} if self.api_key else {})}


class WandbOutlet:
    """Feeds one run."""

    def __init__(self, run: WandbRun, store: ObjectStore) -> None:
        """The process is started with the first thing that there is to tell."""
        self._run = run
        self._store = store
        self._process: asyncio.subprocess.Process | None = None

    async def tell(self, event: job_pb2.TrainingJobEvent, job: job_pb2.TrainingJob) -> bool:
        """See Outlet."""
        step, values = scalars_of(event)
        if values:
            await self._send({"step": step, "values": values}, job)
        if event.HasField("validation_image"):
            await self._send_picture(event.validation_image, job)
        return False

    async def finish(self, job: job_pb2.TrainingJob) -> None:
        """See Outlet."""
        await self._send({"summary": {"step": job.step, "num_worker_starts": job.num_worker_starts}}, job)
        await self._end(_FINISH_SECONDS)

    async def close(self) -> None:
        """See Outlet."""
        try:
            await self._end(_CLOSE_SECONDS)
        except OutletFailedError as error:
            logger.warning("the wandb process of %s did not end well: %s", self._run.run_id, error.message)

    async def _send_picture(self, picture: job_pb2.ValidationImage, job: job_pb2.TrainingJob) -> None:
        try:
            body = await asyncio.to_thread(get_object, self._store, picture.image)
        except ReverieError as error:
            raise OutletFailedError(message=f"a picture could not be read: {error.message}") from error
        file = self._run.directory / "pictures" / f"{picture.image.sha256}.png"
        await asyncio.to_thread(_write, file, body)
        suffix = "_ema" if picture.weights == "ema" else ""
        name = f"{picture.prompt_name}_{picture.width}x{picture.height}_{picture.image_index}{suffix}"
        await self._send({"step": picture.step, "picture": {"name": name, "file": str(file)}}, job)

    async def _send(self, message: Mapping[str, Any], job: job_pb2.TrainingJob) -> None:
        process = self._process or await self._start(job)
        if process.stdin is None:
            raise AssertionError("the process was started with a pipe")
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            await process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise OutletFailedError(message=await self._why_it_ended(process)) from error

    async def _start(self, job: job_pb2.TrainingJob) -> asyncio.subprocess.Process:
        await asyncio.to_thread(self._run.directory.mkdir, parents=True, exist_ok=True)
        # Into a file: a pipe that nobody reads would stop the process once it is full.
        with self._log_file.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "reverie_trainer.jobs.outlets.wandb_process",
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=dict(self._run.environment()),
            )
        await self._send(self._run.hello(job), job)
        return self._process

    async def _end(self, seconds: float) -> None:
        """End the process, by force after so long."""
        process = self._process
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        try:
            async with asyncio.timeout(seconds):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        self._process = None
        if process.returncode:
            raise OutletFailedError(message=await self._why_it_ended(process))

    async def _why_it_ended(self, process: asyncio.subprocess.Process) -> str:
        await process.wait()
        lines = (await asyncio.to_thread(self._log_file.read_bytes)).decode("utf-8", "replace").strip().splitlines()
        return f"the wandb process ended with status {process.returncode}: {lines[-1][:300] if lines else 'no message'}"

    @property
    def _log_file(self) -> Path:
        return self._run.directory / "process.log"


def _write(file: Path, body: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(body)
