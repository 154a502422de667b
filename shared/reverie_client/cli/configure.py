"""`reverie configure`: asks what a job needs, and writes its file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from reverie_common.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    FieldViolation,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from rich.markup import escape

from reverie_client.cli.connection import Address, connect, run
from reverie_client.cli.console import EXIT_INVALID, OutputFormat, print_json, stderr, stdout
from reverie_client.documents import parse
from reverie_client.job_text import job_text
from reverie_client.questions import QUESTIONS, Question, job_of
from reverie_client.specs import parse_job_spec

DEFAULT_FILE = Path("job.yaml")


def configure(
    context: typer.Context,
    answers: Annotated[
        Path | None,
        typer.Option(
            "--answers", help="Answers by name, in YAML or JSON; only what they lack is asked.", dir_okay=False
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take every default.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a job file that is there.")] = False,
    address: Address = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            "-o",
            help="`json` or `text`: how the outcome is printed. Anything else: the job file, by default job.yaml.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Ask what a job needs, one question after the other, and write its file, with a comment for each choice.

    Example: [bold]reverie configure -o job.yaml[/]
    """
    formats = [word for word in outputs or () if word in set(OutputFormat)]
    files = [Path(word) for word in outputs or () if word not in formats]
    output = OutputFormat(formats[0]) if formats else OutputFormat.TEXT
    context.find_root().obj = output
    file = files[0] if files else DEFAULT_FILE
    if file.exists() and not force:
        raise FailedPreconditionError(f"{file} exists; use --force to write over it", reason="FILE_EXISTS")
    found = ask_all(_read_answers(answers) if answers is not None else {}, is_quiet=yes)
    document, comments = job_of(found)
    text = job_text(
        document, comments, "Made by `reverie configure`; `reverie job check FILE` says what it would take."
    )
    spec = parse_job_spec(text, name=str(file))
    file.write_text(text, encoding="utf-8")
    _print_written(file, found, output)
    if not _is_accepted(spec, address):
        raise typer.Exit(EXIT_INVALID)


def ask_all(given: Mapping[str, Any], *, is_quiet: bool) -> dict[str, Any]:
    """Return an answer to every question that applies, in their order.

    Args:
        given: answers that are known already, by the question's name.
        is_quiet: take the default where there is no answer.

    Raises:
        InvalidArgumentError: with every given answer that cannot be taken.
    """
    _refuse_unknown(given)
    found: dict[str, Any] = {}
    violations: list[FieldViolation] = []
    for question in QUESTIONS:
        if not question.applies(found):
            continue
        default = question.default(found)
        try:
            found[question.name] = question.parse(given[question.name]) if question.name in given else default
        except ValueError as error:
            violations.append(FieldViolation(field=question.name, description=str(error)))
            found[question.name] = default
            continue
        if question.name not in given and not is_quiet:
            found[question.name] = _ask(question, default)
    if violations:
        raise InvalidArgumentError("some answers cannot be taken", reason="INVALID_ANSWERS", violations=violations)
    return found


def _ask(question: Question, default: Any) -> Any:
    """Ask until the answer can be taken."""
    console = stderr()
    console.print(f"\n[bold]{escape(question.text)}[/]")
    console.print(f"[dim]{escape(question.explanation)}[/]")
    shown = question.show(default)
    while True:
        answer = typer.prompt(question.name, default=shown, err=True)
        try:
            return question.parse(answer)
        except ValueError as error:
            console.print(f"[red]{escape(str(error))}[/]")


def _read_answers(path: Path) -> Mapping[str, Any]:
    try:
        document = parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist; check the path", reason="NO_ANSWERS") from None
    if not isinstance(document, Mapping):
        raise InvalidArgumentError(f"{path} holds no answers; write NAME: VALUE on each line", reason="INVALID_ANSWERS")
    return document


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    known = [question.name for question in QUESTIONS]
    violations = [
        FieldViolation(field=str(name), description=f"there is no such question; there are {', '.join(known)}")
        for name in given
        if name not in known
    ]
    if violations:
        raise InvalidArgumentError("some answers answer nothing", reason="INVALID_ANSWERS", violations=violations)


def _print_written(file: Path, found: Mapping[str, Any], output: OutputFormat) -> None:
    folder = found.get("folder")
    captions = {
        "textfile": "",
        "filename": " --captions filename",
        "instanceprompt": " --captions none --instance-prompt",
    }
    create = f"reverie dataset create {found['dataset']}"
    add = f"reverie dataset add {found['dataset']} {folder}{captions[found['captions']]}"
    steps = [create, add] if folder else []
    steps += [f"reverie job check {file}", f"reverie job submit {file} --watch"]
    if output is OutputFormat.JSON:
        print_json({"file": str(file), "answers": dict(found), "next": steps})
        return
    stdout().print(f"written to {file}; next:", markup=False)
    for step in steps:
        stdout().print(f"  {step}", markup=False)


def _is_accepted(spec: Any, address: str | None) -> bool:
    """Ask the trainer, where one answers, what is wrong; a dataset that is not there yet is expected."""
    try:
        violations = run(_check(spec, address))
    except (UnavailableError, DeadlineExceededError):
        stderr().print("no trainer answers, so that the job was not checked yet")
        return True
    for field, description in violations:
        stderr().print(f"{field}: {description}", markup=False)
    return all(field.endswith(".dataset") for field, _ in violations)


async def _check(spec: Any, address: str | None) -> list[tuple[str, str]]:
    async with connect(address, retry_seconds=0.0) as reverie:  # where none answers, the file is checked later
        answer = await reverie.jobs.check(spec)
    return [(each.field, each.description) for each in answer.violations]
