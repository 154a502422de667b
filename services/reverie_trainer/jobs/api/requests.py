"""Repetitions of mutations are recognised by their request_id, also after a restart."""

import hashlib
import time

from google.protobuf.message import Message
from reverie_common.errors import AlreadyExistsError, FieldViolation, InvalidArgumentError
from sqlalchemy.orm import Session

from reverie_trainer.jobs.state.models import RequestRow

MAX_REQUEST_ID_CHARACTERS = 36


def check_request_id(request_id: str) -> None:
    """Refuse a request_id that is too long or not ASCII; the empty one is allowed and recognises nothing."""
    if len(request_id) > MAX_REQUEST_ID_CHARACTERS or not request_id.isascii():
        description = f"{request_id[:80]!r} is no request id; give at most {MAX_REQUEST_ID_CHARACTERS} ASCII characters"
        raise InvalidArgumentError(
            description, violations=[FieldViolation(field="request_id", description=description)]
        )


def digest_of(message: Message) -> str:
    """Return what tells one request from another with the same id."""
    return hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest()


def find_repetition(session: Session, method: str, request_id: str, digest: str) -> str | None:
    """Return the job or dataset that the same request was carried out on before, None for a new request.

    Raises:
        AlreadyExistsError: the id was used for another request.
    """
    if not request_id:
        return None
    row = session.get(RequestRow, (method, request_id))
    if row is None:
        return None
    if row.digest != digest:
        raise AlreadyExistsError(
            f"request_id {request_id!r} was used for another {method} request, on {row.resource}; use a new id",
            reason="REQUEST_ID_REUSED",
            metadata={"request_id": request_id, "resource": row.resource},
        )
    return row.resource


def remember(session: Session, method: str, request_id: str, digest: str, resource: str) -> None:
    """Note that a request was carried out on a job or dataset."""
    if request_id:
        session.add(
            RequestRow(method=method, request_id=request_id, digest=digest, resource=resource, time=time.time())
        )
