"""What a person looks at when a job is done: sheet.png and loss.png. Needs the extra `report`.

Pillow and matplotlib are imported when something is drawn, so that the SDK does without them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reverie.training.v1.job_pb2 import TrainingJob

if TYPE_CHECKING:
    from PIL import Image, ImageFont

PICTURE_NAME = re.compile(
    r"step_(?P<step>\d+)_(?P<name>[a-z0-9_-]+)_(?P<index>\d+)_(?P<width>\d+)x(?P<height>\d+)(?P<ema>_ema)?\.png"
)
CELL_PIXELS = 256
GAP_PIXELS = 8
LABEL_PIXELS = 24
FONT_PIXELS = 15
PAPER = (250, 250, 250)
INK = (20, 20, 20)


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Picture:
    """One validation picture on disk."""

    name: str
    width: int
    height: int
    index: int
    step: int
    """Optimiser steps done; 0 is the base model."""
    is_ema: bool = False
    """Whether the running average drew it."""
    path: Path

    @property
    def row(self) -> tuple[str, int, int, int]:
        """What makes pictures of different steps comparable."""
        return (self.name, self.width, self.height, self.index)

    @property
    def column(self) -> tuple[int, bool]:
        """Whose picture it is: the step, and whether of the running average."""
        return (self.step, self.is_ema)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """Figures of a job, a value for each step."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    learning_rates: tuple[float, ...]


def find_pictures(folder: Path) -> list[Picture]:
    """Return the validation pictures in a folder by what their names say; other files are passed over."""
    found = [(path, PICTURE_NAME.fullmatch(path.name)) for path in folder.glob("*.png")] if folder.is_dir() else []
    return sorted(
        Picture(
            name=match["name"],
            width=int(match["width"]),
            height=int(match["height"]),
            index=int(match["index"]),
            step=int(match["step"]),
            is_ema=match["ema"] is not None,
            path=path,
        )
        for path, match in found
        if match is not None
    )


def read_metrics(path: Path) -> Metrics:
    """Read metrics.jsonl; of a step that was done twice, after a restart, the later line counts."""
    by_step: dict[int, Mapping[str, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        by_step[int(entry["step"])] = entry
    steps = sorted(by_step)
    return Metrics(
        steps=tuple(steps),
        losses=tuple(float(by_step[step]["loss"]) for step in steps),
        learning_rates=tuple(float(by_step[step]["learning_rate"]) for step in steps),
    )


def draw_sheet(job: TrainingJob, pictures: Sequence[Picture], path: Path) -> Path:
    """Draw base | step N | step N EMA | ... in columns and prompts and sizes in rows, labelled, to a PNG.

    Pictures are shown whole, scaled to 256 pixels on the longer edge. Raises ValueError without a picture.
    """
    from PIL import Image, ImageDraw

    if not pictures:
        raise ValueError("there is no validation picture to draw a sheet of")
    prompts = {prompt.name: prompt.prompt for prompt in job.spec.validation.prompts}
    columns = sorted({picture.column for picture in pictures})
    rows = _rows(pictures, list(prompts))
    tops = _tops(rows)
    sheet = Image.new("RGB", (GAP_PIXELS + len(columns) * (CELL_PIXELS + GAP_PIXELS), tops[-1]), PAPER)
    pen = ImageDraw.Draw(sheet)
    font = _font()
    for index, column in enumerate(columns):
        pen.text((_left(index), GAP_PIXELS), _column_label(*column), fill=INK, font=font)
    for row, top in zip(rows, tops, strict=False):
        label = f"{row[0]}  {row[1]}x{row[2]}  {prompts.get(row[0], '')}"
        pen.text((GAP_PIXELS, top), _fitting(label, font, sheet.width - 2 * GAP_PIXELS), fill=INK, font=font)
        for picture in (picture for picture in pictures if picture.row == row):
            _paste(sheet, picture, _left(columns.index(picture.column)), top + LABEL_PIXELS)
    sheet.save(path)
    return path


def _column_label(step: int, is_ema: bool) -> str:
    label = f"step {step}" if step else "base"
    return f"{label} EMA" if is_ema else label


def _tops(rows: Sequence[tuple[str, int, int, int]]) -> list[int]:
    """Return where each row's label begins, and the height of the sheet as the last."""
    tops = [LABEL_PIXELS + GAP_PIXELS]
    for _, width, height, _ in rows:
        tops.append(tops[-1] + LABEL_PIXELS + _cell(width, height)[1] + GAP_PIXELS)
    return tops


def _cell(width: int, height: int) -> tuple[int, int]:
    """Return the size in which a picture is shown: its longer edge is that of a cell."""
    scale = CELL_PIXELS / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _rows(pictures: Sequence[Picture], names: Sequence[str]) -> list[tuple[str, int, int, int]]:
    """Return the rows in the order of the job's prompts."""
    order = {name: position for position, name in enumerate(names)}
    return sorted({picture.row for picture in pictures}, key=lambda row: (order.get(row[0], len(order)), row))


def _left(column: int) -> int:
    return GAP_PIXELS + column * (CELL_PIXELS + GAP_PIXELS)


def _paste(sheet: "Image.Image", picture: Picture, left: int, top: int) -> None:
    from PIL import Image

    with Image.open(picture.path) as image:
        small = image.convert("RGB").resize(_cell(picture.width, picture.height), Image.Resampling.LANCZOS)
    sheet.paste(small, (left, top))


def _font() -> "ImageFont.ImageFont | ImageFont.FreeTypeFont":
    from PIL import ImageFont

    return ImageFont.load_default(FONT_PIXELS)


def _fitting(text: str, font: "ImageFont.ImageFont | ImageFont.FreeTypeFont", width: int) -> str:
    """Cut a text to a width, with dots where it was cut."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def draw_loss(title: str, metrics: Metrics, path: Path) -> Path:
    """Draw loss and learning rate over steps to a PNG. Raises ValueError without a step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not metrics.steps:
        raise ValueError("there is no step to draw a curve of")
    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    losses = figure.add_subplot()
    losses.plot(metrics.steps, metrics.losses, color="#9ecae1", linewidth=1, label="loss of a step")
    losses.plot(metrics.steps, smooth(metrics.losses), color="#08519c", linewidth=2, label="running mean")
    losses.set_xlabel("step")
    losses.set_ylabel("loss")
    losses.grid(alpha=0.3)
    rates = losses.twinx()
    rates.plot(metrics.steps, metrics.learning_rates, color="#d94801", linewidth=1.2, label="learning rate")
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="scientific", scilimits=(0, 0))
    lines = [*losses.get_lines(), *rates.get_lines()]
    # Of the two, the axes of the rate are drawn last: the legend belongs there, so that no line crosses it.
    rates.legend(lines, [str(line.get_label()) for line in lines], loc="center right", framealpha=1.0)
    losses.set_title(title)
    figure.savefig(path)
    return path


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Return the exponential running mean, corrected for its start; values that are not finite are left out of it."""
    mean, total, smoothed = 0.0, 0.0, []
    for value in values:
        if value == value and abs(value) != float("inf"):
            mean = weight * mean + (1 - weight) * value
            total = weight * total + (1 - weight)
        smoothed.append(mean / total if total else float("nan"))
    return smoothed
