"""What every outlet is: something that a job's history is told to, in order."""

from dataclasses import dataclass
from typing import Protocol

from reverie.training.v1 import job_pb2

NOTICE_PREFIX = "OUTLET_"
"""Reasons of notices about outlets themselves; they are told to nobody, so that a failure does not tell of itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutletFailedError(Exception):
    """Something could not be told; the history goes on with what comes next."""

    message: str
    """What failed and what to do."""


class Outlet(Protocol):
    """Told by one task at a time."""

    async def tell(self, event: job_pb2.TrainingJobEvent, job: job_pb2.TrainingJob) -> bool:
        """Pass on one event; True where it left this process, so that it must not be told twice.

        Args:
            event: any but a snapshot.
            job: the job as it was when its history was last read.

        Raises:
            OutletFailedError: it could not be passed on, also not after some patience.
        """
        ...

    async def finish(self, job: job_pb2.TrainingJob) -> None:
        """Do what belongs at the end of a job that rests. May be called again after a resume.

        Raises:
            OutletFailedError: it could not be done.
        """
        ...

    async def close(self) -> None:
        """Let go of files and processes; the job may go on, told by another process."""
        ...
