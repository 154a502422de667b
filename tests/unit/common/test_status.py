"""Errors survive the way through google.rpc.Status, and each has the code of the table."""

import pytest
from google.rpc import error_details_pb2
from grpc import StatusCode
from reverie_common import errors
from reverie_common.rpc.status import MAX_STATUS_BYTES, code_of, status_from_error

CODES = {
    errors.InvalidArgumentError: StatusCode.INVALID_ARGUMENT,
    errors.NotFoundError: StatusCode.NOT_FOUND,
    errors.ObjectNotFoundError: StatusCode.NOT_FOUND,
    errors.AlreadyExistsError: StatusCode.ALREADY_EXISTS,
    errors.FailedPreconditionError: StatusCode.FAILED_PRECONDITION,
    errors.AbortedError: StatusCode.ABORTED,
    errors.ResourceExhaustedError: StatusCode.RESOURCE_EXHAUSTED,
    errors.StoreFullError: StatusCode.RESOURCE_EXHAUSTED,
    errors.UnavailableError: StatusCode.UNAVAILABLE,
    errors.StoreUnavailableError: StatusCode.UNAVAILABLE,
    errors.DeadlineExceededError: StatusCode.DEADLINE_EXCEEDED,
    errors.UnauthenticatedError: StatusCode.UNAUTHENTICATED,
    errors.PermissionDeniedError: StatusCode.PERMISSION_DENIED,
    errors.StoreAccessError: StatusCode.PERMISSION_DENIED,
    errors.DataLossError: StatusCode.DATA_LOSS,
    errors.IntegrityError: StatusCode.DATA_LOSS,
    errors.InternalError: StatusCode.INTERNAL,
    errors.ReverieError: StatusCode.INTERNAL,
}


@pytest.mark.parametrize(("error_class", "code"), CODES.items())
def test_every_error_has_the_code_of_the_table(error_class: type[errors.ReverieError], code: StatusCode) -> None:
    assert code_of(error_class("wrong")) is code


def test_the_table_has_every_error() -> None:
    classes = {each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)}
    assert classes == set(CODES)


def test_violations_that_do_not_fit_are_counted() -> None:
    violations = [errors.FieldViolation(field=f"a[{i}]", description="x" * 1000) for i in range(1000)]
    status = status_from_error(errors.InvalidArgumentError("wrong", violations=violations))
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    status.details[0].Unpack(info)
    status.details[1].Unpack(bad_request)
    assert status.ByteSize() < 1.1 * MAX_STATUS_BYTES
    assert len(bad_request.field_violations) + int(info.metadata["violations_omitted"]) == 1000


def test_an_endless_message_is_cut() -> None:
    assert len(status_from_error(errors.InternalError("x" * 100_000)).message) == 4096
