"""`reverie checkpoint`."""

from pathlib import Path
from typing import Annotated

import typer

from reverie_client.cli.console import EXIT_CONFLICT, Output, OutputFormat, print_json, stderr, stdout
from reverie_client.stack.checkpoints import make_tiny

app = typer.Typer(help="Model checkpoints.", no_args_is_help=True)


@app.command("make-tiny")
def make_tiny_command(
    directory: Annotated[Path, typer.Argument(help="Where to write it.", file_okay=False)],
    seed: Annotated[int, typer.Option(help="Seed of its weights; the same seed gives the same bytes.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a directory that is there.")] = False,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Write a complete HiDream-I1 checkpoint of a few megabytes, with random weights.

    Example: [bold]reverie checkpoint make-tiny /tmp/tiny && reverie up --checkpoint /tmp/tiny[/]
    """
    if directory.exists() and any(directory.iterdir()) and not force:
        stderr().print(f"[bold red]error[/] {directory} is not empty; choose another directory, or use --force")
        raise typer.Exit(EXIT_CONFLICT)
    make_tiny(directory, seed=seed)
    if output is OutputFormat.JSON:
        print_json({"directory": str(directory.absolute()), "seed": seed})
    else:
        stdout().print(f"wrote {directory}", markup=False)
