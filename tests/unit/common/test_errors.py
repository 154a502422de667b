"""Reverie's errors keep what programs need."""

from reverie_common.errors import (
    FieldViolation,
    InvalidArgumentError,
    NotFoundError,
    ObjectNotFoundError,
    ReverieError,
    StoreFullError,
)


def test_an_error_has_the_reason_of_its_class() -> None:
    assert ObjectNotFoundError("gone").reason == "OBJECT_NOT_FOUND"


def test_a_reason_can_be_more_exact_than_that_of_the_class() -> None:
    assert NotFoundError("gone", reason="JOB_NOT_FOUND").reason == "JOB_NOT_FOUND"


def test_an_error_keeps_everything_that_it_was_given() -> None:
    violation = FieldViolation(field="seed", description="-1 is below 0")

    error = InvalidArgumentError("wrong", metadata={"seed": "-1"}, violations=[violation], retry_after_seconds=1.5)

    assert (error.message, str(error)) == ("wrong", "wrong")
    assert error.metadata == {"seed": "-1"}
    assert error.violations == (violation,)
    assert error.retry_after_seconds == 1.5


def test_errors_do_not_share_their_metadata() -> None:
    metadata = {"key": "a"}
    error = ReverieError("wrong", metadata=metadata)
    metadata["key"] = "b"
    assert error.metadata == {"key": "a"}


def test_a_full_store_is_not_an_unavailable_one() -> None:
    assert StoreFullError("full").reason == "STORE_FULL"
