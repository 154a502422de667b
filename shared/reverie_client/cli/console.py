"""What the command prints: results on standard output, everything else on standard error, and exit codes."""

import json
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from reverie_common.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ReverieError,
    UnavailableError,
)
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reverie_client.errors import JobFailedError

EXIT_FAILED = 1
EXIT_INVALID = 2
EXIT_UNREACHABLE = 3
EXIT_NOT_FOUND = 4
EXIT_CONFLICT = 5
EXIT_INTERRUPTED = 130

EXIT_CODES: Sequence[tuple[type[ReverieError], int]] = (
    (JobFailedError, EXIT_FAILED),
    (InvalidArgumentError, EXIT_INVALID),
    (UnavailableError, EXIT_UNREACHABLE),
    (DeadlineExceededError, EXIT_UNREACHABLE),
    (NotFoundError, EXIT_NOT_FOUND),
    (AlreadyExistsError, EXIT_CONFLICT),
    (FailedPreconditionError, EXIT_CONFLICT),
)

EXIT_CODES_HELP = (
    "Exit codes: 0 done; 1 the job or the operation failed; 2 wrong usage or invalid input; 3 a service is not "
    "reachable; 4 not found; 5 exists already, or not possible in this state; 130 interrupted."
)


class OutputFormat(StrEnum):
    """How results are printed."""

    TEXT = "text"
    JSON = "json"


def _remember(context: typer.Context, value: OutputFormat) -> OutputFormat:
    context.find_root().obj = value
    return value


Output = Annotated[
    OutputFormat,
    typer.Option("--output", "-o", help="Print results for people (text) or programs (json).", callback=_remember),
]


def stdout() -> Console:
    """Return a console for results."""
    return Console(highlight=False, soft_wrap=True)


def stderr() -> Console:
    """Return a console for progress and errors."""
    return Console(stderr=True, highlight=False)


def exit_code_of(error: ReverieError) -> int:
    """Return the exit code that tells a script what kind of error it was."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), EXIT_FAILED)


def message_dict(message: Message) -> dict[str, Any]:
    """Return a message in the JSON form that job files have."""
    return MessageToDict(message, preserving_proto_field_name=True)


def print_json(value: Any) -> None:
    """Print one JSON document on one or more lines."""
    stdout().print(json.dumps(value, indent=2, ensure_ascii=False), markup=False)


def print_json_line(value: Any) -> None:
    """Print one JSON document on one line."""
    stdout().print(json.dumps(value, ensure_ascii=False), markup=False)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a plain table on standard output; columns without a name have no header."""
    table = Table(*columns, box=None, pad_edge=False, header_style="bold", show_header=any(columns))
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    Console(highlight=False, width=None).print(table)


def print_error(error: ReverieError, output: OutputFormat) -> None:
    """Print one error: what is wrong, each field with value and limit, and what to do."""
    if output is OutputFormat.JSON:
        Console(stderr=True, soft_wrap=True).print(json.dumps(error_dict(error)), markup=False, highlight=False)
        return
    console = stderr()
    console.print(f"[bold red]error[/] {escape(error.message)}", soft_wrap=True)
    for violation in error.violations:
        console.print(f"  [bold]{escape(violation.field)}[/]: {escape(violation.description)}", soft_wrap=True)
    remedy = remedy_of(error)
    if remedy:
        console.print(f"[bold]what to do[/] {escape(remedy)}", soft_wrap=True)


def error_dict(error: ReverieError) -> Mapping[str, Any]:
    """Return an error as plain values."""
    return {
        "error": {
            "reason": error.reason,
            "message": error.message,
            "remedy": remedy_of(error),
            "violations": [{"field": found.field, "description": found.description} for found in error.violations],
            "metadata": error.metadata,
            "exit_code": exit_code_of(error),
        }
    }


def remedy_of(error: ReverieError) -> str:
    """Return what to do about an error where its message does not say it."""
    if isinstance(error, JobFailedError):
        return error.remedy
    if isinstance(error, UnavailableError) and error.reason == UnavailableError.default_reason:
        return "start the services with `reverie up`, or name a running trainer with --address HOST:PORT"
    return ""
