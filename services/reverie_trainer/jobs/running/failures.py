"""How a job fails: with a reason for programs, a message and a remedy for people."""

from reverie.training.v1 import job_pb2
from reverie_common.errors import ReverieError


class JobFailedError(Exception):
    """A job cannot go on."""

    def __init__(self, reason: str, message: str, remedy: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.remedy = remedy

    def to_proto(self) -> job_pb2.JobFailure:
        """Return the failure as the contract shows it."""
        return job_pb2.JobFailure(reason=self.reason, message=self.message, remedy=self.remedy)


def failure_from_error(error: ReverieError) -> JobFailedError:
    """Return the failure that an error of a service or the store is for a job."""
    fields = "".join(f"\n{violation.field}: {violation.description}" for violation in error.violations)
    remedy = "Correct what the message names, then resume the job (`reverie job resume JOB_ID`)."
    return JobFailedError(error.reason, error.message + fields, remedy)
