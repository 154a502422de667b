"""`reverie job`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from reverie.training.v1 import training_pb2 as pb
from reverie.training.v1.job_pb2 import TrainingJob, TrainingJobSpec, TrainingJobState
from reverie_common.errors import DeadlineExceededError, FieldViolation, InvalidArgumentError, UnavailableError
from rich.markup import escape

from reverie_client.cli import importing
from reverie_client.cli.connection import Address, connect, run
from reverie_client.cli.console import (
    EXIT_INTERRUPTED,
    Output,
    OutputFormat,
    message_dict,
    print_json,
    print_json_line,
    print_table,
    stderr,
    stdout,
)
from reverie_client.cli.job_text import describe_job, plan_lines
from reverie_client.cli.progress import JobView, TransferBar, state_name
from reverie_client.client import Reverie
from reverie_client.errors import JobFailedError
from reverie_client.jobs import RESTING
from reverie_client.prompt_library import add_prompts
from reverie_client.results import Results, write_results
from reverie_client.specs import JobReading, read_job_file, read_job_text

app = typer.Typer(help="Training jobs.", no_args_is_help=True)

JobFile = Annotated[Path, typer.Argument(help="The job in YAML or JSON; - reads it from standard input.")]
JobId = Annotated[str, typer.Argument(help="The job's id, job- and 12 hex digits.")]
Step = Annotated[int, typer.Option(min=0, help="The checkpoint, by its step; 0 is the newest.")]
PromptLibraryFile = Annotated[
    Path | None,
    typer.Option(
        help="Add the prompts of a SimpleTuner prompt library (JSON: short name to prompt) to those of the job.",
        dir_okay=False,
        show_default=False,
    ),
]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Follow the job until it rests.")]


@app.command("check")
def check_command(
    file: JobFile,
    prompt_library: PromptLibraryFile = None,
    address: Address = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Say what is wrong with a job, all at once, or what it would take. Changes nothing.

    Example: [bold]reverie job check job.yaml[/]
    """
    answer = run(_check(_read(file, address, prompt_library), address))
    if output is OutputFormat.JSON:
        print_json(message_dict(answer))
    else:
        for line in plan_lines(answer):
            stdout().print(line, markup=False)
    if answer.violations:
        raise _violations_error(answer)


@app.command("submit")
def submit_command(
    file: Annotated[
        Path | None, typer.Argument(help="The job in YAML or JSON; - reads it from standard input.")
    ] = None,
    watch: Watch = False,
    prompt_library: PromptLibraryFile = None,
    simpletuner: Annotated[
        Path | None,
        typer.Option(
            "--simpletuner",
            help="In place of a file: SimpleTuner's configuration folder. Its pictures are uploaded first.",
            show_default=False,
        ),
    ] = None,
    dataset_root: importing.DatasetRoot = None,
    overrides: importing.Overrides = None,
    allow_refused: importing.AllowRefused = False,
    address: Address = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Submit a job and print its id; with --watch, follow it.

    Example: [bold]reverie job submit job.yaml --watch[/]

    Example: [bold]reverie job submit --simpletuner config --dataset-root .[/]
    """
    if (file is None) == (simpletuner is None):
        raise InvalidArgumentError("give a job file or --simpletuner, and not both")
    if simpletuner is None:
        spec = _read(file or Path("-"), address, prompt_library)
    else:
        imported = importing.read_simpletuner(simpletuner, dataset_root, overrides)
        spec = importing.bring(imported, simpletuner, address, allow_refused=allow_refused)
        _add_prompts(spec, prompt_library)
    job = run(_submit(spec, address))
    if not watch:
        _print_job_id(job, output)
        return
    if output is OutputFormat.TEXT:
        stderr().print(f"job {job.job_id}")
    _follow(job.job_id, 0, address, output)


@app.command("watch")
def watch_command(
    job_id: JobId,
    after: Annotated[int, typer.Option(min=0, help="Only events after this sequence number.")] = 0,
    address: Address = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Follow a job until it rests. Ctrl-C stops following; the job goes on. With -o json: one event on each line.

    Example: [bold]reverie job watch job-0123456789ab[/]
    """
    _follow(job_id, after, address, output)


@app.command("list")
def list_command(
    state: Annotated[
        list[str] | None, typer.Option(help="Only jobs in this state, for instance TRAINING; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    address: Address = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """List jobs, newest first.

    Example: [bold]reverie job list --state TRAINING[/]
    """
    jobs = run(_list([_state(name) for name in state or ()], limit, address))
    if output is OutputFormat.JSON:
        print_json({"jobs": [message_dict(job) for job in jobs]})
        return
    rows = [
        (
            job.job_id,
            job.spec.name,
            state_name(job.state),
            f"{job.step}/{job.spec.optimization.max_steps}",
            job.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S UTC"),
        )
        for job in jobs
    ]
    print_table(("job", "name", "state", "step", "created"), rows)


@app.command("get")
def get_command(job_id: JobId, address: Address = None, output: Output = OutputFormat.TEXT) -> None:
    """Show one job: state, figures, phases, what preparation found.

    Example: [bold]reverie job get job-0123456789ab -o json[/]
    """
    _print_job(run(_get(job_id, address)), output)


@app.command("cancel")
def cancel_command(job_id: JobId, address: Address = None, output: Output = OutputFormat.TEXT) -> None:
    """Stop a job. What it has saved stays, and `reverie job resume` takes it up again."""
    _print_job(run(_cancel(job_id, address)), output)


@app.command("resume")
def resume_command(
    job_id: JobId, step: Step = 0, watch: Watch = False, address: Address = None, output: Output = OutputFormat.TEXT
) -> None:
    """Take up a cancelled or failed job from its newest checkpoint, or from that of a step; later ones are forgotten.

    Example: [bold]reverie job resume job-0123456789ab --step 400[/]
    """
    job = run(_resume(job_id, step, address))
    if watch:
        _follow(job_id, job.last_sequence, address, output)
    else:
        _print_job(job, output)


@app.command("fork")
def fork_command(
    job_id: JobId,
    file: Annotated[
        Path | None, typer.Argument(help="The new job. Default: the other one's.", show_default=False)
    ] = None,
    step: Step = 0,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Begin at step 0 with a fresh optimiser; otherwise go on exactly.")
    ] = False,
    watch: Watch = False,
    address: Address = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Submit a new job that begins at a checkpoint of another one, which stays as it is.

    Example: [bold]reverie job fork job-0123456789ab longer.yaml --step 400 --watch[/]
    """
    spec = _read(file, address) if file is not None else None
    job = run(_fork(job_id, spec, step, adapter_only, address))
    if not watch:
        _print_job_id(job, output)
        return
    if output is OutputFormat.TEXT:
        stderr().print(f"job {job.job_id}")
    _follow(job.job_id, 0, address, output)


@app.command("validate")
def validate_command(job_id: JobId, address: Address = None, output: Output = OutputFormat.TEXT) -> None:
    """Have the pictures of a job in training drawn now, after the step that it is at.

    Example: [bold]reverie job validate job-0123456789ab[/]
    """
    job = run(_request_validation(job_id, address))
    if output is OutputFormat.JSON:
        print_json(message_dict(job))
    else:
        stdout().print(
            f"pictures of {job_id} are drawn after step {job.step}; follow it with: reverie job watch {job_id}"
        )


@app.command("fetch")
def fetch_command(
    job_id: JobId,
    to: Annotated[
        Path | None, typer.Option(help="Folder to write to. Default: the job's id.", show_default=False)
    ] = None,
    address: Address = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Download what a job made: job.json, adapter, pictures, sheet.png, loss.png. May be repeated after Ctrl-C.

    Example: [bold]reverie job fetch job-0123456789ab --to results[/]
    """
    results = run(_fetch(job_id, to or Path(job_id), address))
    if output is OutputFormat.JSON:
        print_json(
            {
                "folder": str(results.folder),
                "files": [str(path) for path in results.files],
                "sheet": str(results.sheet) if results.sheet else None,
                "loss": str(results.loss) if results.loss else None,
                "scores": str(results.scores) if results.scores else None,
                "evaluations": str(results.evaluations) if results.evaluations else None,
            }
        )
        return
    stdout().print(f"{len(results.files)} files in {results.folder}", markup=False)
    for path in (results.sheet, results.loss, results.scores, results.evaluations):
        if path is not None:
            stdout().print(str(path), markup=False)


def _read(file: Path, address: str | None, prompt_library: Path | None = None) -> TrainingJobSpec:
    """Read a job; one that cannot be read is refused together with what the trainer finds wrong in the rest of it."""
    is_piped = str(file) == "-"
    reading = read_job_text(sys.stdin.read(), name="standard input") if is_piped else read_job_file(file)
    if reading.violations:
        raise reading.error(_found_by_trainer(reading, address))
    _add_prompts(reading.spec, prompt_library)
    return reading.spec


def _add_prompts(spec: TrainingJobSpec, prompt_library: Path | None) -> None:
    if prompt_library is not None:
        for note in add_prompts(spec, prompt_library):
            stderr().print(note, markup=False)


def _found_by_trainer(reading: JobReading, address: str | None) -> list[FieldViolation]:
    try:
        answer = run(_check(reading.spec, address))
    except (UnavailableError, DeadlineExceededError):
        return []  # what was found here is worth saying without it
    return [FieldViolation(field=each.field, description=each.description) for each in answer.violations]


def _state(name: str) -> "TrainingJobState.ValueType":
    full = f"TRAINING_JOB_STATE_{name.upper()}"
    if full not in TrainingJobState.keys() or name.upper() == "UNSPECIFIED":  # noqa: SIM118 - not a mapping
        known = ", ".join(key.removeprefix("TRAINING_JOB_STATE_") for key in TrainingJobState.keys()[1:])
        violation = FieldViolation(field="--state", description=f"{name!r} is not a state; there are {known}")
        raise InvalidArgumentError("a job is never in that state", violations=[violation])
    return TrainingJobState.Value(full)


def _violations_error(answer: pb.CheckTrainingJobResponse) -> InvalidArgumentError:
    violations = [FieldViolation(field=each.field, description=each.description) for each in answer.violations]
    return InvalidArgumentError("the job would not be accepted", reason="INVALID_JOB", violations=violations)


def _follow(job_id: str, after: int, address: str | None, output: OutputFormat) -> None:
    """Follow a job; raises JobFailedError unless it succeeds."""
    try:
        job = run(_watch(job_id, after, address, output))
    except KeyboardInterrupt:
        stderr().print(f"the job goes on; follow it with [bold]reverie job watch {escape(job_id)}[/]")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if job.state != TrainingJobState.TRAINING_JOB_STATE_SUCCEEDED:
        raise JobFailedError(job)
    if output is OutputFormat.TEXT:
        _print_job(job, output)
        stdout().print(f"fetch its results with: reverie job fetch {job_id}", markup=False)


async def _watch(job_id: str, after: int, address: str | None, output: OutputFormat) -> TrainingJob:
    async with connect(address) as reverie:
        with JobView(stderr()) as view:
            async for event in reverie.jobs.watch(job_id, after_sequence=after):
                if output is OutputFormat.JSON:
                    print_json_line(message_dict(event))
                else:
                    view.show(event)
        return await reverie.jobs.get(job_id)


async def _check(spec: TrainingJobSpec, address: str | None) -> pb.CheckTrainingJobResponse:
    async with connect(address) as reverie:
        return await reverie.jobs.check(spec)


async def _submit(spec: TrainingJobSpec, address: str | None) -> TrainingJob:
    async with connect(address) as reverie:
        return await reverie.jobs.submit(spec)


async def _list(states: list["TrainingJobState.ValueType"], limit: int, address: str | None) -> tuple[TrainingJob, ...]:
    async with connect(address) as reverie:
        return await reverie.jobs.list(states=states, limit=limit)


async def _get(job_id: str, address: str | None) -> TrainingJob:
    async with connect(address) as reverie:
        return await reverie.jobs.get(job_id)


async def _cancel(job_id: str, address: str | None) -> TrainingJob:
    async with connect(address) as reverie:
        return await reverie.jobs.cancel(job_id)


async def _resume(job_id: str, step: int, address: str | None) -> TrainingJob:
    async with connect(address) as reverie:
        return await reverie.jobs.resume(job_id, step=step)


async def _fork(
    job_id: str, spec: TrainingJobSpec | None, step: int, adapter_only: bool, address: str | None
) -> TrainingJob:
    async with connect(address) as reverie:
        return await reverie.jobs.fork(job_id, spec=spec, step=step, adapter_only=adapter_only)


async def _request_validation(job_id: str, address: str | None) -> TrainingJob:
    async with connect(address) as reverie:
        return await reverie.jobs.request_validation(job_id)


async def _fetch(job_id: str, folder: Path, address: str | None) -> Results:
    reverie: Reverie
    async with connect(address) as reverie:
        with TransferBar(stderr(), "download") as bar:
            return await write_results(reverie, job_id, folder, on_progress=bar.update)


def _print_job_id(job: TrainingJob, output: OutputFormat) -> None:
    if output is OutputFormat.JSON:
        print_json(message_dict(job))
        return
    stdout().print(job.job_id, markup=False)
    stderr().print(f"follow it with: reverie job watch {job.job_id}")


def _print_job(job: TrainingJob, output: OutputFormat) -> None:
    if output is OutputFormat.JSON:
        print_json(message_dict(job))
        return
    print_table(("", ""), describe_job(job))
    if job.state in RESTING and job.HasField("failure"):
        stdout().print(f"what to do: {job.failure.remedy}", markup=False)
