"""The errors that Reverie raises on purpose, one class for each way in which a caller has to react.

A servicer raises them, the error interceptor of `reverie_common.rpc` turns them into google.rpc.Status, and a client
gets the same class back. The choice of gRPC codes is not here but in `reverie_common.rpc.status`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldViolation:
    """One thing that is wrong with one field of a request."""

    field: str
    """Path of the field, for instance `optimization.learning_rate` or `datasets[1].resolution`."""

    description: str
    """The value, the limit and the remedy."""


class ReverieError(Exception):
    """The base of every error that Reverie raises on purpose.

    Args:
        message: what was wrong, the value, the limit, and what to do.
        reason: UPPER_SNAKE name of the cause, for programs; the class has a default.
        metadata: every variable of the message again, for programs.
        violations: the fields that are wrong, all at once.
        retry_after_seconds: when it makes sense to try again; None where it does not or is unknown.
    """

    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_seconds = retry_after_seconds


class InvalidArgumentError(ReverieError):
    """A field of the request is wrong, whatever state the server is in."""

    default_reason = "INVALID_ARGUMENT"


class NotFoundError(ReverieError):
    """The job, dataset, bucket or object that was named does not exist."""

    default_reason = "NOT_FOUND"


class AlreadyExistsError(ReverieError):
    """The name is taken, or the request_id was used for another request."""

    default_reason = "ALREADY_EXISTS"


class FailedPreconditionError(ReverieError):
    """The thing that was named is not in a state for this; repeating will not help until somebody changes that."""

    default_reason = "FAILED_PRECONDITION"


class AbortedError(ReverieError):
    """A race was lost; read the record again and decide anew."""

    default_reason = "ABORTED"


class ResourceExhaustedError(ReverieError):
    """A queue, a quota, memory or a disk is full."""

    default_reason = "RESOURCE_EXHAUSTED"


class UnavailableError(ReverieError):
    """A server is loading, draining or unreachable; the same request may succeed later."""

    default_reason = "UNAVAILABLE"


class DeadlineExceededError(ReverieError):
    """The time that the caller gave was over before the answer was there."""

    default_reason = "DEADLINE_EXCEEDED"


class UnauthenticatedError(ReverieError):
    """The caller did not prove who it is."""

    default_reason = "UNAUTHENTICATED"


class PermissionDeniedError(ReverieError):
    """The caller is known and may not do this."""

    default_reason = "PERMISSION_DENIED"


class DataLossError(ReverieError):
    """Stored data is not what was written."""

    default_reason = "DATA_LOSS"


class InternalError(ReverieError):
    """A bug of the server; its log has the trace."""

    default_reason = "INTERNAL"


class ObjectNotFoundError(NotFoundError):
    """The object store has no object of that key."""

    default_reason = "OBJECT_NOT_FOUND"


class IntegrityError(DataLossError):
    """An object's bytes do not have the digest, size or format that they were written with."""

    default_reason = "OBJECT_CORRUPT"


class StoreUnavailableError(UnavailableError):
    """The object store did not answer, or answered with a server error, until the retries were over."""

    default_reason = "STORE_UNAVAILABLE"


class StoreFullError(ResourceExhaustedError):
    """The object store has no room for another object."""

    default_reason = "STORE_FULL"


class StoreAccessError(PermissionDeniedError):
    """The object store refused the credentials."""

    default_reason = "STORE_ACCESS_DENIED"
