"""Errors that only a client meets; everything else is in `reverie_common.errors`.

JobFailedError      a job came to rest without succeeding
TransferError       a file could not be sent to or read from the store
    UrlExpiredError     the store no longer accepts the presigned URL
"""

from reverie.training.v1.job_pb2 import TrainingJob, TrainingJobState
from reverie_common.errors import ReverieError, UnavailableError


class JobFailedError(ReverieError):
    """A job ended FAILED or CANCELLED. `job` is the job as it is."""

    def __init__(self, job: TrainingJob) -> None:
        """Say why from the job's failure, and what to do."""
        self.job = job
        self.remedy = job.failure.remedy or f"take it up again with `reverie job resume {job.job_id}`"
        state = TrainingJobState.Name(job.state).removeprefix("TRAINING_JOB_STATE_")
        why = job.failure.message or "it was cancelled"
        super().__init__(
            f"job {job.job_id} is {state} at step {job.step} of {job.spec.optimization.max_steps}: {why}",
            reason=job.failure.reason or f"JOB_{state}",
        )


class TransferError(UnavailableError):
    """A file could not be moved, after every retry."""

    default_reason = "TRANSFER_FAILED"


class UrlExpiredError(TransferError):
    """The store no longer accepts a presigned URL; ask for a new one."""
