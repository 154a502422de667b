"""`reverie dataset`."""

from pathlib import Path
from typing import Annotated

import typer
from reverie.training.v1 import training_pb2 as pb

from reverie_client.cli.connection import Address, connect, run
from reverie_client.cli.console import (
    EXIT_FAILED,
    Output,
    OutputFormat,
    message_dict,
    print_json,
    print_table,
    stderr,
    stdout,
)
from reverie_client.cli.progress import TransferBar, readable_bytes
from reverie_client.client import Reverie
from reverie_client.folder import LocalFolder, read_folders

app = typer.Typer(help="Datasets: pictures and captions under a name.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name of the dataset: 1 to 63 of a-z, 0-9 and -.")]
Folders = Annotated[
    list[Path],
    typer.Argument(help="Folders of pictures, each with its captions in PICTURE.txt beside it, one on each line."),
]
InstancePrompt = Annotated[
    bool,
    typer.Option("--instance-prompt", help="Pictures may lack captions: the job gives an instance_prompt."),
]


@app.command("create")
def create_command(
    name: Name,
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders to add at once.")] = None,
    instance_prompt: InstancePrompt = False,
    address: Address = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Create a dataset and, with folders, add their pictures to it.

    Example: [bold]reverie dataset create my-cat ./photos[/]
    """
    local = read_folders(folders, needs_captions=not instance_prompt) if folders else None
    run(_create(name, local, address, output))


@app.command("add")
def add_command(
    name: Name,
    folders: Folders,
    instance_prompt: InstancePrompt = False,
    address: Address = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Add pictures and captions to a dataset. What the store holds is not sent again; equal names are replaced.

    Example: [bold]reverie dataset add my-cat ./photos ./more-photos[/]
    """
    local = read_folders(folders, needs_captions=not instance_prompt)
    run(_add(name, local, address, output))


@app.command("scan")
def scan_command(name: Name, address: Address = None, output: Output = OutputFormat.TEXT) -> None:
    """Open every picture of a dataset and say what is wrong with it. Exit code 1 when something is.

    Example: [bold]reverie dataset scan my-cat[/]
    """
    found = run(_scan(name, address))
    broken = [sample for sample in found if sample.problems]
    if output is OutputFormat.JSON:
        print_json({"samples": [message_dict(sample) for sample in found], "num_broken": len(broken)})
    else:
        for sample in broken:
            stdout().print(f"{sample.sample}: {'; '.join(sample.problems)}", markup=False)
        stdout().print(f"{len(found)} samples, {len(broken)} with problems")
    if broken:
        raise typer.Exit(EXIT_FAILED)


@app.command("list")
def list_command(address: Address = None, output: Output = OutputFormat.TEXT) -> None:
    """List datasets."""
    datasets = run(_list(address))
    if output is OutputFormat.JSON:
        print_json({"datasets": [message_dict(dataset) for dataset in datasets]})
        return
    rows = [(each.name, each.num_samples, readable_bytes(each.size_bytes), each.version[:12]) for each in datasets]
    print_table(("name", "samples", "size", "version"), rows)


@app.command("delete")
def delete_command(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    address: Address = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Delete a dataset. Pictures that other datasets share stay."""
    if not yes:
        typer.confirm(f"Delete the dataset {name}?", abort=True, err=True)
    run(_delete(name, address))
    if output is OutputFormat.JSON:
        print_json({"deleted": name})
    else:
        stdout().print(f"deleted {name}", markup=False)


async def _create(name: str, local: LocalFolder | None, address: str | None, output: OutputFormat) -> None:
    async with connect(address) as reverie:
        dataset = await reverie.datasets.create(name)
        if local is not None:
            dataset = (await _upload(reverie, name, local)).dataset
    _print_dataset(dataset, output)


async def _add(name: str, local: LocalFolder, address: str | None, output: OutputFormat) -> None:
    async with connect(address) as reverie:
        answer = await _upload(reverie, name, local)
    if output is OutputFormat.JSON:
        print_json(message_dict(answer))
        return
    stdout().print(f"{answer.num_added} added, {answer.num_replaced} replaced")
    _print_dataset(answer.dataset, output)


async def _upload(reverie: Reverie, name: str, local: LocalFolder) -> pb.AddSamplesResponse:
    if local.ignored:
        names = ", ".join(path.name for path in local.ignored[:5]) + (", ..." if len(local.ignored) > 5 else "")
        stderr().print(f"passed over {len(local.ignored)} files that are neither pictures nor captions: {names}")
    with TransferBar(stderr(), "upload") as bar:
        return await reverie.datasets.upload(name, local, on_progress=bar.update)


async def _scan(name: str, address: str | None) -> list[pb.ScanDatasetResponse]:
    found: list[pb.ScanDatasetResponse] = []
    console = stderr()
    async with connect(address) as reverie:
        with console.status("scanning"):
            async for sample in reverie.datasets.scan(name):
                found.append(sample)
    return found


async def _list(address: str | None) -> tuple[pb.Dataset, ...]:
    async with connect(address) as reverie:
        return await reverie.datasets.list()


async def _delete(name: str, address: str | None) -> None:
    async with connect(address) as reverie:
        await reverie.datasets.delete(name)


def _print_dataset(dataset: pb.Dataset, output: OutputFormat) -> None:
    if output is OutputFormat.JSON:
        print_json(message_dict(dataset))
        return
    size = readable_bytes(dataset.size_bytes)
    stdout().print(f"dataset {dataset.name}: {dataset.num_samples} samples, {size}", markup=False)
