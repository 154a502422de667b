"""The commands, put together."""

from typing import Any

import typer
from reverie_common.errors import ReverieError
from typer.core import TyperGroup

from reverie_client.cli import checkpoints, configure, datasets, importing, jobs, sample, stack
from reverie_client.cli.console import (
    EXIT_CODES_HELP,
    EXIT_INTERRUPTED,
    OutputFormat,
    exit_code_of,
    print_error,
    stderr,
)


class ReverieGroup(TyperGroup):
    """The root of the commands, where errors become messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error that Reverie raises on purpose is printed without a trace."""
        try:
            return super().invoke(ctx)
        except ReverieError as error:
            print_error(error, ctx.obj or OutputFormat.TEXT)
            raise typer.Exit(exit_code_of(error)) from None
        except KeyboardInterrupt:
            stderr().print("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None


app = typer.Typer(
    cls=ReverieGroup,
    name="reverie",
    help=f"Fine-tune HiDream-I1: photos and captions in, an adapter and pictures out.\n\n{EXIT_CODES_HELP}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up")(stack.up)
app.command("down")(stack.down)
app.command("status")(stack.status)
app.add_typer(datasets.app, name="dataset")
app.add_typer(jobs.app, name="job")
app.add_typer(importing.app, name="import")
app.command("configure")(configure.configure)
app.command("sample")(sample.sample)
app.add_typer(checkpoints.app, name="checkpoint")
