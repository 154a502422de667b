"""Reverie's errors as google.rpc.Status, and back.

This is the only place that chooses gRPC codes. A status carries exactly one ErrorInfo of domain "reverie", BadRequest
where fields are wrong, and RetryInfo where repeating makes sense.
"""

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from reverie_common.errors import (
    AbortedError,
    AlreadyExistsError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    FieldViolation,
    IntegrityError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ObjectNotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    ReverieError,
    StoreAccessError,
    StoreFullError,
    StoreUnavailableError,
    UnauthenticatedError,
    UnavailableError,
)

DOMAIN = "reverie"

# A status travels in trailers. Our channels take 256 KiB of them (see MAX_METADATA_BYTES), base64 adds a third, and the
# message is sent twice.
MAX_STATUS_BYTES = 96 * 1024
MAX_METADATA_BYTES = 256 * 1024
MAX_MESSAGE_CHARACTERS = 4096

_CODES: dict[type[ReverieError], grpc.StatusCode] = {
    InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    FailedPreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    AbortedError: grpc.StatusCode.ABORTED,
    ResourceExhaustedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    DataLossError: grpc.StatusCode.DATA_LOSS,
    InternalError: grpc.StatusCode.INTERNAL,
}
_CLASSES = {code: error_class for error_class, code in _CODES.items()} | {
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
}

# Errors of the store keep their class across a call; told apart by reason.
_CLASSES_BY_REASON: dict[str, type[ReverieError]] = {
    error_class.default_reason: error_class
    for error_class in (ObjectNotFoundError, IntegrityError, StoreUnavailableError, StoreFullError, StoreAccessError)
}


def code_of(error: ReverieError) -> grpc.StatusCode:
    """The gRPC code of an error: that of the nearest class that has one."""
    return next((_CODES[base] for base in type(error).__mro__ if base in _CODES), grpc.StatusCode.INTERNAL)


def status_from_error(error: ReverieError) -> status_pb2.Status:
    """Write an error as a google.rpc.Status, bounded in size; violations that do not fit are counted."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    message = _shorten(error.message)
    status = status_pb2.Status(code=code_of(error).value[0], message=message)
    fitting = _fitting_violations(error.violations)
    if len(fitting) < len(error.violations):
        info.metadata["violations_omitted"] = str(len(error.violations) - len(fitting))
    status.details.append(_pack(info))
    if fitting:
        status.details.append(_pack(error_details_pb2.BadRequest(field_violations=fitting)))
    if error.retry_after_seconds is not None:
        status.details.append(_pack(error_details_pb2.RetryInfo(retry_delay=_duration(error.retry_after_seconds))))
    return status


def _fitting_violations(violations: tuple[FieldViolation, ...]) -> list[error_details_pb2.BadRequest.FieldViolation]:
    fitting = []
    left_bytes = MAX_STATUS_BYTES
    for violation in violations:
        message = error_details_pb2.BadRequest.FieldViolation(
            field=violation.field, description=_shorten(violation.description), reason="INVALID_FIELD"
        )
        left_bytes -= message.ByteSize() + 4
        if left_bytes < 0:
            break
        fitting.append(message)
    return fitting


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE_CHARACTERS else f"{text[: MAX_MESSAGE_CHARACTERS - 3]}..."


def _duration(seconds: float) -> duration_pb2.Duration:
    return duration_pb2.Duration(seconds=math.floor(seconds), nanos=int(seconds % 1 * 1e9))


def _pack(
    message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def error_from_rpc(error: grpc.RpcError) -> ReverieError:
    """Read a failed call as the error that the server raised, with its reason, metadata, violations and delay.

    An error that carries no details, as those of gRPC itself do, gets its class from the code alone.
    """
    status = _details(error)
    if status is None:
        return _error_from_code(error)
    info, violations, retry_after_seconds = _unpack(status)
    error_class = _class_of(error.code(), info.reason)
    return error_class(
        status.message,
        reason=info.reason or None,
        metadata=info.metadata,
        violations=violations,
        retry_after_seconds=retry_after_seconds,
    )


def _class_of(code: grpc.StatusCode, reason: str) -> type[ReverieError]:
    general = _CLASSES.get(code, InternalError)
    special = _CLASSES_BY_REASON.get(reason)
    return special if special is not None and issubclass(special, general) else general


def _error_from_code(error: grpc.RpcError) -> ReverieError:
    code = error.code()
    message = error.details() or f"the call failed with {code.name}"
    error_class = _CLASSES.get(code, InternalError)
    return error_class(message, reason=None if code in _CLASSES else code.name)


def _details(error: grpc.RpcError) -> status_pb2.Status | None:
    try:
        return rpc_status.from_call(error)
    except ValueError:
        # A proxy changed the code or the text; the code is what it wants us to see.
        return None


def _unpack(
    status: status_pb2.Status,
) -> tuple[error_details_pb2.ErrorInfo, tuple[FieldViolation, ...], float | None]:
    info, bad_request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    retry_after_seconds = None
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad_request)
        if detail.Unpack(retry):
            retry_after_seconds = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    violations = tuple(
        FieldViolation(field=violation.field, description=violation.description)
        for violation in bad_request.field_violations
    )
    return info, violations, retry_after_seconds


@contextmanager
def translated() -> Iterator[None]:
    """Raise failed calls in the block as ReverieErrors: `with translated(): await stub.GetJob(...)`."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.CANCELLED and _is_cancelling():
            raise asyncio.CancelledError from error
        raise error_from_rpc(error) from error


def _is_cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
