"""`reverie import`: configurations of other programs become jobs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from reverie.training.v1 import training_pb2 as pb
from reverie.training.v1.job_pb2 import TrainingJobSpec
from reverie_common.errors import AlreadyExistsError, FailedPreconditionError, FieldViolation, InvalidArgumentError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reverie_client.cli import dataset_sources as sources
from reverie_client.cli.connection import Address, connect, run
from reverie_client.cli.console import EXIT_FAILED, OutputFormat, print_json, stderr, stdout
from reverie_client.cli.progress import TransferBar
from reverie_client.client import Reverie
from reverie_client.folder import LocalFolder
from reverie_client.hub import HubSource
from reverie_client.job_text import job_text
from reverie_client.simpletuner import DatasetPlan, Imported, Outcome, import_configuration
from reverie_client.simpletuner.reading import parse_json
from reverie_client.simpletuner.table import options_as_json, options_table
from reverie_client.specs import parse_job_spec

app = typer.Typer(help="Bring a configuration of another program.", no_args_is_help=True)

MIN_WIDTH = 100
"""Columns of the report, however narrow the terminal says that it is."""

STYLES = {
    Outcome.HONOURED: "green",
    Outcome.CHANGED: "yellow",
    Outcome.IGNORED: "dim",
    Outcome.REFUSED: "bold red",
    Outcome.ADDED: "cyan",
}

ConfigDir = Annotated[Path, typer.Argument(help="SimpleTuner's configuration folder, with config.json.")]
DatasetRoot = Annotated[
    Path | None,
    typer.Option(
        "--dataset-root",
        help="Where relative paths of pictures begin. Default: the current folder.",
        file_okay=False,
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="OPTION=VALUE",
        help="Take this value for an option of config.json, as on SimpleTuner's command line; may be repeated.",
    ),
]
AllowRefused = Annotated[
    bool,
    typer.Option("--allow-refused", help="Go on although something does not work; it is left out."),
]
Outputs = Annotated[
    list[str] | None,
    typer.Option(
        "--output",
        "-o",
        help="`json` or `text`: how the report is printed. Anything else: the job file to write. May be given twice.",
        show_default=False,
    ),
]


@app.command("simpletuner")
def simpletuner_command(
    context: typer.Context,
    config_dir: ConfigDir,
    dataset_root: DatasetRoot = None,
    overrides: Overrides = None,
    upload: Annotated[bool, typer.Option("--upload", help="Create the datasets and bring their pictures.")] = False,
    allow_refused: AllowRefused = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a job file that is there.")] = False,
    address: Address = None,
    outputs: Outputs = None,
) -> None:
    """Turn a configuration of SimpleTuner's into a job file, and say what became of each of its keys.

    Exit code 1 when something that was asked for does not work.

    Example: [bold]reverie import simpletuner config --dataset-root . -o job.yaml[/]
    """
    output, file = _outputs(outputs or ())
    context.find_root().obj = output
    if file is not None and file.exists() and not force:
        raise FailedPreconditionError(f"{file} exists; use --force to write over it", reason="FILE_EXISTS")
    imported = read_simpletuner(config_dir, dataset_root, overrides)
    if file is not None:
        file.write_text(job_file_text(imported, config_dir), encoding="utf-8")
    _print_imported(imported, file, output, is_uploading=upload)
    refuse_refusals(imported, allow_refused=allow_refused)
    if upload:
        run(upload_plans(imported.plans, address))


@app.command("options")
def options_command(outputs: Outputs = None) -> None:
    """List every option of SimpleTuner's that exists for HiDream, and what becomes of it.

    Example: [bold]reverie import options -o json[/]
    """
    output, _ = _outputs(outputs or ())
    if output is OutputFormat.JSON:
        print_json(options_as_json())
    else:
        stdout().print(options_table(), markup=False)


def read_simpletuner(config_dir: Path, dataset_root: Path | None, overrides: Sequence[str] | None) -> Imported:
    """Read a configuration as the options of a command say."""
    return import_configuration(config_dir, dataset_root=dataset_root, overrides=_parse_overrides(overrides or ()))


def job_file_text(imported: Imported, config_dir: Path) -> str:
    """Return the job file of a configuration."""
    head = f"From SimpleTuner's configuration in {config_dir}, by `reverie import simpletuner`."
    return job_text(imported.document, imported.comments, head)


def spec_of(imported: Imported, config_dir: Path) -> TrainingJobSpec:
    """Return the job of a configuration. Raises InvalidArgumentError with what does not fit its fields."""
    return parse_job_spec(job_file_text(imported, config_dir), name=f"the job made from {config_dir}")


def bring(imported: Imported, config_dir: Path, address: str | None, *, allow_refused: bool) -> TrainingJobSpec:
    """Print the report of a configuration, bring its pictures, and return its job. Raises typer.Exit for a refusal."""
    spec = spec_of(imported, config_dir)
    print_report(imported, stderr())
    refuse_refusals(imported, allow_refused=allow_refused)
    run(upload_plans(imported.plans, address))
    return spec


def refuse_refusals(imported: Imported, *, allow_refused: bool) -> None:
    """Raise typer.Exit where something was refused."""
    if imported.report.has_refusals and not allow_refused:
        count = len(imported.report.of(Outcome.REFUSED))
        what = "key does" if count == 1 else "keys do"
        stderr().print(f"{count} {what} not work here; change them, or leave them out with --allow-refused")
        raise typer.Exit(EXIT_FAILED)


def _outputs(values: Sequence[str]) -> tuple[OutputFormat, Path | None]:
    """Take formats and files apart."""
    formats = [value for value in values if value in set(OutputFormat)]
    files = [value for value in values if value not in formats]
    if len(formats) > 1 or len(files) > 1:
        violation = FieldViolation(field="--output", description="it takes one format and one file at most")
        raise InvalidArgumentError("--output is given too often", violations=[violation])
    return OutputFormat(formats[0]) if formats else OutputFormat.TEXT, Path(files[0]) if files else None


def _parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            violation = FieldViolation(field="--set", description=f"{word!r} is not OPTION=VALUE")
            raise InvalidArgumentError("an option has no value", violations=[violation])
        found[name] = parse_json(value, name) if value[:1] in ("[", "{") else value
    return found


def _print_imported(imported: Imported, file: Path | None, output: OutputFormat, *, is_uploading: bool) -> None:
    if output is OutputFormat.JSON:
        print_json(imported_as_json(imported, file))
        return
    print_report(imported, stdout())
    if imported.plans and not is_uploading:
        stdout().print("\nThe datasets that the job names; --upload runs these commands:")
        for plan in imported.plans:
            for command in plan.commands():
                stdout().print(f"  {command}", markup=False)
    if file is not None:
        stdout().print(f"\nwritten to {file}; look at it, then: reverie job check {file}", markup=False)


def imported_as_json(imported: Imported, file: Path | None) -> Mapping[str, Any]:
    """Return everything about an import as plain values."""
    return {
        "job": imported.document,
        "file": None if file is None else str(file),
        "counts": imported.report.counts(),
        "lines": imported.report.as_json(),
        "datasets": [
            {"name": plan.name, "entry": plan.entry, "kind": plan.kind, "commands": list(plan.commands())}
            for plan in imported.plans
        ],
    }


def print_report(imported: Imported, console: Console) -> None:
    """Print the report as a table, and its sums."""
    wide = Console(file=console.file, highlight=False, width=max(console.width, MIN_WIDTH))
    for file in imported.report.files():
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("key", "value", "outcome", "meaning"):
            # Folded, not cut: the end of a key is what tells one from another.
            table.add_column(column, overflow="fold")
        for key, value, outcome, meaning in imported.report.rows(file):
            style = STYLES[Outcome(outcome)]
            table.add_row(escape(key), escape(value), f"[{style}]{outcome}[/]", escape(meaning))
        wide.print(f"[bold]{escape(file)}[/]")
        wide.print(table)
        wide.print()
    counts = ", ".join(f"{count} {outcome}" for outcome, count in imported.report.counts().items() if count)
    console.print(counts)


async def upload_plans(plans: Sequence[DatasetPlan], address: str | None) -> None:
    """Create the datasets of a job and bring their pictures. May be repeated: what is there is not sent again."""
    folders = {plan.name: _read_folder(plan) for plan in plans if plan.kind == "local"}
    async with connect(address) as reverie:
        for plan in plans:
            await _create(reverie, plan)
            if plan.kind == "local":
                answer = await sources.upload(reverie, plan.name, folders[plan.name])
                _tell(plan, answer.num_added + answer.num_replaced)
            elif plan.kind == "huggingface":
                await _upload_hub(reverie, plan)
            else:
                await _import(reverie, plan)


def _read_folder(plan: DatasetPlan) -> LocalFolder:
    captions = sources.captions_from(
        plan.captions,
        plan.table,
        filename_column=plan.filename_column,
        caption_column=plan.caption_column or None,
        fallback_column=plan.fallback_column,
        no_extension=not plan.has_extension,
    )
    folder = plan.folder if plan.folder is not None else Path()
    return sources.read_local([folder], captions, masks=plan.masks, instance_prompt=not plan.needs_captions)


async def _create(reverie: Reverie, plan: DatasetPlan) -> None:
    try:
        await reverie.datasets.create(plan.name)
    except AlreadyExistsError:
        stderr().print(f"dataset {plan.name} exists; pictures are added to it", markup=False)


async def _upload_hub(reverie: Reverie, plan: DatasetPlan) -> None:
    source = HubSource(
        path=plan.place,
        split=plan.split,
        revision=plan.revision,
        image_column=plan.image_column,
        caption_column=plan.caption_column,
    )
    with TransferBar(stderr(), "upload") as bar:
        answers = await reverie.datasets.upload_hub(plan.name, source, on_progress=bar.update)
    _tell(plan, sum(answer.num_added + answer.num_replaced for answer in answers))


async def _import(reverie: Reverie, plan: DatasetPlan) -> None:
    source: pb.BucketSource | Sequence[pb.UrlImage] = pb.BucketSource(
        bucket=plan.place, prefix=plan.prefix, caption_strategy=plan.captions
    )
    if plan.kind == "urls":
        table = plan.table if plan.table is not None else Path()
        source = sources.url_images(
            table, url_column=plan.url_column, caption_column=plan.caption_column, name_column="name"
        )
    num_done = 0
    async for response in sources.responses(reverie, plan.name, source):
        num_done = response.num_done
        for item in response.rejected:
            stderr().print(f"{item.sample} is left out: {item.message}", markup=False)
    _tell(plan, num_done)


def _tell(plan: DatasetPlan, num_samples: int) -> None:
    stderr().print(f"dataset {plan.name}: {num_samples} samples brought", markup=False)
