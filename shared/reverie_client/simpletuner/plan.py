"""What has to be brought to the store before the job can run: a plan for each dataset, and the command that does it."""

import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetPlan:
    """One dataset of the job and where its pictures are."""

    name: str
    """In Reverie."""
    entry: str
    """Its id in SimpleTuner's file."""
    kind: str
    """`local`, `bucket`, `huggingface` or `urls`."""
    folder: Path | None = None
    captions: str = "textfile"
    """For `local` and `bucket`: `textfile`, `filename`, `none`, `csv` or `parquet`."""
    table: Path | None = None
    """With captions `csv` or `parquet`, or the list of `urls`."""
    filename_column: str = "filename"
    url_column: str = "url"
    caption_column: str = ""
    fallback_column: str = ""
    image_column: str = "image"
    has_extension: bool = True
    masks: Path | None = None
    needs_captions: bool = True
    place: str = ""
    """Bucket, or name on the Hub."""
    prefix: str = ""
    split: str = "train"
    revision: str | None = None

    def commands(self) -> tuple[str, ...]:
        """The commands that create and fill it."""
        return (
            shlex.join(["reverie", "dataset", "create", self.name]),
            shlex.join(["reverie", "dataset", *self._fill()]),
        )

    def _fill(self) -> list[str]:
        if self.kind == "bucket":
            return ["import", self.name, "--bucket", self.place, "--prefix", self.prefix, "--captions", self.captions]
        if self.kind == "urls":
            columns = ["--url-column", self.url_column, "--caption-column", self.caption_column or "caption"]
            return ["import", self.name, "--urls", str(self.table), *columns]
        if self.kind == "huggingface":
            words = ["add", self.name, "--huggingface", self.place, "--split", self.split]
            words += ["--revision", self.revision] if self.revision else []
            words += ["--image-column", self.image_column]
            return [*words, "--caption-column", self.caption_column] if self.caption_column else words
        return self._fill_from_folder()

    def _fill_from_folder(self) -> list[str]:
        words = ["add", self.name, str(self.folder), "--captions", self.captions]
        if self.table is not None:
            words += ["--caption-file", str(self.table), "--filename-column", self.filename_column]
            words += ["--caption-column", self.caption_column or "caption"]
            words += ["--fallback-caption-column", self.fallback_column] if self.fallback_column else []
            words += [] if self.has_extension else ["--no-extension"]
        words += ["--masks", str(self.masks)] if self.masks is not None else []
        return words if self.needs_captions else [*words, "--instance-prompt"]
