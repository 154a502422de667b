"""`reverie dataset add` and `reverie dataset import`: where pictures, captions and masks come from."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from reverie.training.v1 import training_pb2 as pb
from reverie.training.v1.job_pb2 import RejectedSample
from reverie_common.errors import InvalidArgumentError

from reverie_client.captions import STRATEGIES, CaptionSource, TableColumns, csv_rows, open_captions, texts_of
from reverie_client.cli.connection import connect
from reverie_client.cli.console import OutputFormat, message_dict, print_json, stderr, stdout
from reverie_client.cli.progress import TransferBar, readable_bytes
from reverie_client.client import Reverie
from reverie_client.folder import LocalFolder, read_folders
from reverie_client.hub import HubSource

MAX_URLS_PER_CALL = 10_000
MAX_CALL_BYTES = 2 << 20
"""Of URLs and captions in one call; the limit of a message is 4 MiB."""

Captions = Annotated[
    str,
    typer.Option("--captions", help=f"Where captions come from: {', '.join(STRATEGIES)}. textfile is PICTURE.txt."),
]
CaptionFile = Annotated[
    Path | None, typer.Option("--caption-file", help="The table of --captions csv or parquet: a row for each picture.")
]
FilenameColumn = Annotated[str, typer.Option("--filename-column", help="Its column of file names.")]
CaptionColumn = Annotated[
    str | None, typer.Option("--caption-column", help="Its column of captions; `caption` in tables, none on the Hub.")
]
FallbackColumn = Annotated[
    str, typer.Option("--fallback-caption-column", help="A column to read where the caption is blank.")
]
NoExtension = Annotated[
    bool, typer.Option("--no-extension", help="File names in the table are without .png and so on.")
]
Masks = Annotated[
    Path | None,
    typer.Option("--masks", help="Folder of masks, each named as its picture; white counts."),
]
Hub = Annotated[
    str | None,
    typer.Option("--huggingface", help="ORG/NAME on the Hub, or a folder in its layout."),
]
Split = Annotated[str, typer.Option("--split", help="Split of the Hub's dataset.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Revision of the Hub's dataset.")]
ImageColumn = Annotated[str, typer.Option("--image-column", help="Column of pictures of the Hub's dataset.")]
Limit = Annotated[int, typer.Option("--limit", min=0, help="Take the first so many of the Hub's dataset; 0 takes all.")]


def read_local(
    folders: Sequence[Path], captions: CaptionSource, *, masks: Path | None, instance_prompt: bool
) -> LocalFolder:
    """Read folders as the options say."""
    return read_folders(folders, needs_captions=not instance_prompt, captions=captions, masks=masks)


def captions_from(
    strategy: str,
    table: Path | None,
    *,
    filename_column: str = "filename",
    caption_column: str | None = None,
    fallback_column: str = "",
    no_extension: bool = False,
) -> CaptionSource:
    """Return the source of captions that the options name."""
    columns = TableColumns(
        filename=filename_column,
        caption=caption_column or "caption",
        fallback_caption=fallback_column,
        includes_extension=not no_extension,
    )
    return open_captions(strategy, table, columns)


async def upload(reverie: Reverie, name: str, local: LocalFolder) -> pb.AddSamplesResponse:
    """Send folders, with a bar."""
    if local.ignored:
        names = ", ".join(path.name for path in local.ignored[:5]) + (", ..." if len(local.ignored) > 5 else "")
        stderr().print(
            f"passed over {len(local.ignored)} files that are neither pictures nor their captions or masks: {names}"
        )
    with TransferBar(stderr(), "upload") as bar:
        return await reverie.datasets.upload(name, local, on_progress=bar.update)


async def add(name: str, source: LocalFolder | HubSource, address: str | None, output: OutputFormat) -> None:
    """Add pictures of this machine or of the Hub to a dataset."""
    async with connect(address) as reverie:
        if isinstance(source, LocalFolder):
            answers: Sequence[pb.AddSamplesResponse] = [await upload(reverie, name, source)]
        else:
            with TransferBar(stderr(), "upload") as bar:
                answers = await reverie.datasets.upload_hub(name, source, on_progress=bar.update)
    total = pb.AddSamplesResponse(
        dataset=answers[-1].dataset,
        num_added=sum(answer.num_added for answer in answers),
        num_replaced=sum(answer.num_replaced for answer in answers),
    )
    if output is OutputFormat.JSON:
        print_json(message_dict(total))
        return
    stdout().print(f"{total.num_added} added, {total.num_replaced} replaced")
    print_dataset(total.dataset, output)


def url_images(path: Path, *, url_column: str, caption_column: str, name_column: str) -> list[pb.UrlImage]:
    """Return the images that a CSV file lists; a column of captions or names that it lacks is passed over.

    Raises:
        InvalidArgumentError: it cannot be read, lists nothing, or has no column of URLs.
    """
    if not path.is_file():
        raise InvalidArgumentError(f"{path}: there is no such file; check the path of --urls")
    rows = list(csv_rows(path))
    if not rows:
        raise InvalidArgumentError(f"no images detected in dataset: {path} lists no URLs")
    if url_column not in rows[0]:
        raise InvalidArgumentError(f"{path} has no column {url_column!r}, only {', '.join(rows[0])}; use --url-column")
    return [
        pb.UrlImage(
            url=str(row[url_column] or "").strip(),
            captions=texts_of(row.get(caption_column)),
            name=str(row.get(name_column) or "").strip(),
        )
        for row in rows
    ]


async def import_from(
    name: str,
    source: pb.BucketSource | Sequence[pb.UrlImage],
    address: str | None,
    output: OutputFormat,
) -> int:
    """Import images where they are; returns how many could not be read."""
    rejected: list[RejectedSample] = []
    dataset = pb.Dataset(name=name)
    async with connect(address) as reverie:
        with stderr().status("importing") as status:
            async for response in responses(reverie, name, source):
                status.update(f"importing {response.num_done} of {response.num_total}")
                rejected += response.rejected
                dataset = response.dataset if response.HasField("dataset") else dataset
    if output is OutputFormat.JSON:
        print_json({"dataset": message_dict(dataset), "rejected": [message_dict(item) for item in rejected]})
        return len(rejected)
    for item in rejected:
        stdout().print(f"{item.sample} is left out: {item.message}", markup=False)
    print_dataset(dataset, output)
    return len(rejected)


async def responses(
    reverie: Reverie, name: str, source: pb.BucketSource | Sequence[pb.UrlImage]
) -> AsyncIterator[pb.ImportSamplesResponse]:
    """Import images where they are, in as many calls as it takes."""
    if isinstance(source, pb.BucketSource):
        strategy = source.caption_strategy
        async for response in reverie.datasets.import_bucket(name, source.bucket, source.prefix, captions=strategy):
            yield response
        return
    for part in cut_urls(source):
        async for response in reverie.datasets.import_urls(name, part):
            yield response


def cut_urls(images: Sequence[pb.UrlImage]) -> list[list[pb.UrlImage]]:
    """Cut a list of URLs into calls of a size that a server takes."""
    parts: list[list[pb.UrlImage]] = [[]]
    size_bytes = 0
    for image in images:
        if len(parts[-1]) == MAX_URLS_PER_CALL or size_bytes + image.ByteSize() > MAX_CALL_BYTES:
            parts.append([])
            size_bytes = 0
        parts[-1].append(image)
        size_bytes += image.ByteSize()
    return parts


def print_dataset(dataset: pb.Dataset, output: OutputFormat) -> None:
    """Print a dataset as the output wants it."""
    if output is OutputFormat.JSON:
        print_json(message_dict(dataset))
        return
    size = readable_bytes(dataset.size_bytes)
    stdout().print(f"dataset {dataset.name}: {dataset.num_samples} samples, {size}", markup=False)
