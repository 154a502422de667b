"""`reverie dataset`."""

from pathlib import Path
from typing import Annotated

import typer
from reverie.training.v1 import training_pb2 as pb
from reverie_common.errors import InvalidArgumentError

from reverie_client.cli import dataset_sources as sources
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
from reverie_client.cli.progress import readable_bytes
from reverie_client.folder import LocalFolder
from reverie_client.hub import HubSource

app = typer.Typer(help="Datasets: pictures and captions under a name.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name of the dataset: 1 to 63 of a-z, 0-9 and -.")]
FOLDERS_HELP = "Folders of pictures, each with its captions in PICTURE.txt beside it, one on each line."
InstancePrompt = Annotated[
    bool,
    typer.Option("--instance-prompt", help="Pictures may lack captions: the job gives an instance_prompt."),
]


@app.command("create")
def create_command(
    name: Name,
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders to add at once.")] = None,
    instance_prompt: InstancePrompt = False,
    captions: sources.Captions = "textfile",
    masks: sources.Masks = None,
    address: Address = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Create a dataset and, with folders, add their pictures to it.

    Example: [bold]reverie dataset create my-cat ./photos[/]
    """
    local = None
    if folders:
        source = sources.captions_from(captions, None)
        local = sources.read_local(folders, source, masks=masks, instance_prompt=instance_prompt)
    run(_create(name, local, address, output))


@app.command("add")
def add_command(
    name: Name,
    folders: Annotated[list[Path] | None, typer.Argument(help=FOLDERS_HELP)] = None,
    instance_prompt: InstancePrompt = False,
    captions: sources.Captions = "textfile",
    caption_file: sources.CaptionFile = None,
    filename_column: sources.FilenameColumn = "filename",
    caption_column: sources.CaptionColumn = None,
    fallback_caption_column: sources.FallbackColumn = "",
    no_extension: sources.NoExtension = False,
    masks: sources.Masks = None,
    huggingface: sources.Hub = None,
    split: sources.Split = "train",
    revision: sources.Revision = None,
    image_column: sources.ImageColumn = "image",
    limit: sources.Limit = 0,
    address: Address = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Add pictures and captions to a dataset. What the store holds is not sent again; equal names are replaced.

    Example: [bold]reverie dataset add my-cat ./photos --captions csv --caption-file captions.csv[/]

    Example: [bold]reverie dataset add art --huggingface org/name --split train --caption-column text[/]
    """
    if bool(folders) == bool(huggingface):
        raise InvalidArgumentError("give folders or --huggingface, and not both")
    if huggingface:
        hub = HubSource(
            path=huggingface,
            split=split,
            revision=revision,
            image_column=image_column,
            caption_column=caption_column or "",
            limit=limit,
        )
        run(sources.add(name, hub, address, output))
        return
    source = sources.captions_from(
        captions,
        caption_file,
        filename_column=filename_column,
        caption_column=caption_column,
        fallback_column=fallback_caption_column,
        no_extension=no_extension,
    )
    local = sources.read_local(folders or [], source, masks=masks, instance_prompt=instance_prompt)
    run(sources.add(name, local, address, output))


@app.command("import")
def import_command(
    name: Name,
    bucket: Annotated[str | None, typer.Option("--bucket", help="A bucket that the trainer may read.")] = None,
    prefix: Annotated[str, typer.Option("--prefix", help="Only objects under it, with its final /.")] = "",
    captions: Annotated[str, typer.Option("--captions", help="In a bucket: textfile or filename.")] = "textfile",
    urls: Annotated[Path | None, typer.Option("--urls", help="A CSV file with a row for each image.")] = None,
    url_column: Annotated[str, typer.Option("--url-column", help="Its column of URLs.")] = "url",
    caption_column: Annotated[str, typer.Option("--caption-column", help="Its column of captions.")] = "caption",
    name_column: Annotated[str, typer.Option("--name-column", help="Its column of names.")] = "name",
    address: Address = None,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Add images where they are: from another bucket, or from the web. Exit code 1 when some could not be read.

    Example: [bold]reverie dataset import art --bucket photos --prefix art/[/]

    Example: [bold]reverie dataset import art --urls list.csv[/]
    """
    if bool(bucket) == bool(urls):
        raise InvalidArgumentError("give --bucket or --urls, and not both")
    source: pb.BucketSource | list[pb.UrlImage] = pb.BucketSource(
        bucket=bucket or "", prefix=prefix, caption_strategy=captions
    )
    if urls:
        source = sources.url_images(urls, url_column=url_column, caption_column=caption_column, name_column=name_column)
    if run(sources.import_from(name, source, address, output)):
        raise typer.Exit(EXIT_FAILED)


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
            dataset = (await sources.upload(reverie, name, local)).dataset
    sources.print_dataset(dataset, output)


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
