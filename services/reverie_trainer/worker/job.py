"""The job that a worker has leased, in the worker's own terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from reverie.training.v1.training_pb2 import LeaseJobResponse
from reverie_common.errors import InvalidArgumentError
from reverie_common.storage import ObjectStore, get_object

from reverie_trainer.jobs.spec import Adapter, JobSpec, spec_from_proto
from reverie_trainer.worker.checkpoints import SavedCheckpoint, read_checkpoint
from reverie_trainer.worker.samples import PreparedData, read_manifest

_DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "no": torch.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class LeasedJob:
    """What to train, on what, and from where on."""

    job_id: str
    spec: JobSpec
    data: PreparedData
    checkpoint: SavedCheckpoint | None
    """Where an earlier worker came to; None for a fresh start."""
    last_reported_step: int = 0
    """The last step that the trainer knows of; an earlier worker may have saved more than it could report."""

    @property
    def adapter(self) -> Adapter:
        """The adapter to train.

        Raises:
            InvalidArgumentError: the job names none.
        """
        if self.spec.adapter is None:
            raise InvalidArgumentError("adapter is missing; give adapter.lokr", reason="ADAPTER_MISSING")
        return self.spec.adapter

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype.

        Raises:
            InvalidArgumentError: mixed_precision is unknown.
        """
        name = self.spec.model.mixed_precision
        if name not in _DTYPES:
            raise InvalidArgumentError(f"model.mixed_precision is {name!r}; use one of {', '.join(_DTYPES)}")
        return _DTYPES[name]

    @property
    def takes_adapter_alone(self) -> bool:
        """Whether the checkpoint gives its adapter and nothing else: the start of a job with `start.adapter_only`."""
        return self.checkpoint is not None and self.checkpoint.step == 0

    @property
    def begins_at_anothers(self) -> bool:
        """Whether the checkpoint is another job's, whose steps are none of this one."""
        return self.checkpoint is not None and "start" in self.checkpoint.scalars

    @property
    def first_step(self) -> int:
        """The first step to train, from 1."""
        return 1 if self.checkpoint is None else self.checkpoint.step + 1


def read_job(store: ObjectStore, lease: LeaseJobResponse) -> LeasedJob:
    """Read what a lease refers to. Blocks.

    Raises:
        ReverieError: the store is away, or what it holds is damaged.
    """
    checkpoint = read_checkpoint(store, lease.checkpoint) if lease.HasField("checkpoint") else None
    return LeasedJob(
        job_id=lease.job.job_id,
        spec=spec_from_proto(lease.job.spec),
        data=read_manifest(get_object(store, lease.prepared)),
        checkpoint=checkpoint,
        last_reported_step=lease.job.step,
    )
