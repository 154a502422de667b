"""Which errors end a job for good, and what they tell the person who started it."""

from __future__ import annotations

import torch
from reverie.training.v1.job_pb2 import JobFailure
from reverie_common.errors import (
    DataLossError,
    InvalidArgumentError,
    NotFoundError,
    ReverieError,
    StoreAccessError,
    StoreFullError,
)
from reverie_hidream.adapters.config import AdapterMatchesNothingError
from reverie_hidream.training.step import NonFiniteLossError

from reverie_trainer.jobs.running.failures import JobFailedError
from reverie_trainer.worker.proof import ExportRefutedError, NothingLearntError


def failure_of(error: BaseException) -> JobFailure | None:
    """Say why a job cannot go on; None where another worker may succeed, or where the error is a bug."""
    if isinstance(error, NonFiniteLossError):
        return JobFailure(
            reason="NON_FINITE_LOSS",
            message=str(error),
            remedy="lower optimization.learning_rate or optimization.max_grad_norm, add warm-up, and resume the job: "
            "it goes on from its newest checkpoint; with mixed_precision `no` everything is computed in float32",
        )
    if isinstance(error, AdapterMatchesNothingError):
        return JobFailure(
            reason="ADAPTER_MATCHES_NOTHING",
            message=str(error),
            remedy="correct adapter.lokr.apply_preset; target_module [Attention] adapts the attention of every block",
        )
    if isinstance(error, torch.OutOfMemoryError):
        return JobFailure(
            reason="OUT_OF_MEMORY",
            message=str(error).split("\n", 1)[0],
            remedy="switch optimization.gradient_checkpointing on, lower optimization.batch_size or the resolution, or "
            "set model.base_precision to int8-quanto",
        )
    if isinstance(error, JobFailedError):
        return error.to_proto()
    if isinstance(error, NothingLearntError):
        return JobFailure(
            reason="NOTHING_LEARNT",
            message=str(error),
            remedy="the steps so far are lost in rounding; raise optimization.max_steps (job fork goes on from the "
            "newest checkpoint) or optimization.learning_rate, or shorten optimization.lr_warmup_steps",
        )
    if isinstance(error, ExportRefutedError):
        return JobFailure(reason="EXPORT_REFUTED", message=str(error), remedy="keep the checkpoints and report a bug")
    if isinstance(error, ReverieError):
        return _failure_of_known(error)
    if isinstance(error, ValueError):
        return JobFailure(reason="JOB_NOT_TRAINABLE", message=str(error), remedy="correct the job and submit it again")
    return None


def _failure_of_known(error: ReverieError) -> JobFailure | None:
    remedies: tuple[tuple[type[ReverieError], str], ...] = (
        (StoreFullError, "make room in the object store, then resume the job"),
        (StoreAccessError, "correct the store's credentials of the trainer, then resume the job"),
        (DataLossError, "something in the object store is damaged; submit the job again, which prepares it anew"),
        (NotFoundError, "bring back what is missing, then resume the job; submitting it again prepares the data anew"),
        (InvalidArgumentError, "correct the job or the trainer's settings, and submit it again"),
    )
    for kind, remedy in remedies:
        if isinstance(error, kind):
            return JobFailure(reason=error.reason, message=error.message, remedy=remedy)
    return None
