"""The files of jobs, as outlets see them."""

from collections.abc import Mapping
from dataclasses import dataclass

from reverie.common.v1 import common_pb2
from sqlalchemy.orm import Session

from reverie_trainer.jobs.state.database import Database
from reverie_trainer.jobs.state.repository import list_artifacts, put_artifact

_ALL = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFiles:
    """What ListArtifacts shows."""

    database: Database

    async def all(self, job_id: str) -> Mapping[str, common_pb2.ObjectRef]:
        """Return what a job made, by path."""
        return dict(await self.database.run(lambda session: list_artifacts(session, job_id, None, _ALL)))

    async def put(self, job_id: str, files: Mapping[str, common_pb2.ObjectRef]) -> None:
        """Keep more files as made by a job, by path."""
        await self.database.run(lambda session: _put(session, job_id, files))


def _put(session: Session, job_id: str, files: Mapping[str, common_pb2.ObjectRef]) -> None:
    for path, reference in files.items():
        put_artifact(session, job_id, path, reference)
