"""Progress of uploads and jobs, as bars on a terminal and as lines everywhere else."""

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from reverie.training.v1.job_pb2 import (
    NoticeSeverity,
    PreparationProgress,
    StepMetrics,
    TrainingJob,
    TrainingJobEvent,
    TrainingJobState,
    ValidationProgress,
    ValidationScores,
)
from reverie.training.v1.measures_pb2 import EvaluationResult
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from reverie_client.transfer import Progress as Transferred

STAGES: Mapping[str, str] = {
    "inspect": "inspect images",
    "encode_prompts": "encode captions",
    "encode_images": "encode images",
    "encode_masks": "encode masks",
}
LINES_PER_JOB = 10
"""Training lines in all where bars cannot be drawn."""


def readable_bytes(size_bytes: float) -> str:
    """Return 512 B, 3.4 kB, 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000 or unit == "GB":
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    raise AssertionError


def state_name(state: "TrainingJobState.ValueType") -> str:
    """Return QUEUED for TRAINING_JOB_STATE_QUEUED."""
    return TrainingJobState.Name(state).removeprefix("TRAINING_JOB_STATE_")


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )


class TransferBar:
    """One bar for a set of files."""

    def __init__(self, console: Console, title: str) -> None:
        """Draw on `console`; where it is no terminal, say one line at the end."""
        self._console = console
        self._title = title
        self._bars = _bars(console)
        self._task = self._bars.add_task(title, total=None, note="")
        self._last: Transferred | None = None

    def update(self, progress: Transferred) -> None:
        """Show how far the files are."""
        self._last = progress
        note = f"{readable_bytes(progress.done_bytes)} of {readable_bytes(progress.total_bytes)}"
        self._bars.update(self._task, completed=progress.num_done, total=progress.num_total, note=note)

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        self._bars.stop()
        if self._last is not None and not self._console.is_terminal:
            files = f"{self._last.num_done} of {self._last.num_total} files"
            self._console.print(f"{self._title}: {files}, {readable_bytes(self._last.done_bytes)}")


class JobView:
    """Shows a job's events as they come. `show` is a callback for `Jobs.wait`."""

    def __init__(self, console: Console) -> None:
        """Draw on `console`."""
        self._console = console
        self._bars = _bars(console)
        self._tasks: dict[str, TaskID] = {}
        self._said: set[str] = set()
        self._max_steps = 0

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        self._bars.stop()

    def show(self, event: TrainingJobEvent) -> None:
        """Show one event."""
        kind = event.WhichOneof("payload")
        if kind == "snapshot":
            self._snapshot(event.snapshot)
        elif kind == "state_changed":
            change = event.state_changed
            self._say(f"{state_name(change.to_state).lower()} {change.message}".strip())
        elif kind == "preparation":
            self._preparation(event.preparation)
        elif kind == "step":
            self._step(event.step)
        elif kind == "checkpoint":
            self._say_once(f"checkpoint at step {event.checkpoint.step}")
        elif kind == "validation_progress":
            self._validation(event.validation_progress)
        elif kind == "validation_scores":
            self._scores(event.validation_scores)
        elif kind == "evaluation":
            self._evaluation(event.evaluation)
        elif kind == "notice":
            is_warning = event.notice.severity == NoticeSeverity.NOTICE_SEVERITY_WARNING
            self._say(event.notice.message, style="yellow" if is_warning else None)

    def _snapshot(self, job: TrainingJob) -> None:
        self._max_steps = job.spec.optimization.max_steps
        if job.step:
            self._step(job.metrics if job.HasField("metrics") else StepMetrics(step=job.step))

    def _preparation(self, progress: PreparationProgress) -> None:
        title = STAGES.get(progress.stage, progress.stage)
        note = f"{progress.num_cached} found in the store" if progress.num_cached else ""
        self._draw(title, progress.num_done, progress.num_total, note)
        if progress.num_done == progress.num_total:
            self._line_once(f"{title}: {progress.num_done} done {f'({note})' if note else ''}".strip())

    def _step(self, metrics: StepMetrics) -> None:
        note = f"loss {metrics.loss:.4f}  lr {metrics.learning_rate:.1e}  {metrics.step_seconds:.2f} s/step"
        self._draw("train", metrics.step, self._max_steps, note)
        every = max(1, self._max_steps // LINES_PER_JOB)
        if metrics.step % every == 0 or metrics.step == self._max_steps:
            self._line_once(f"step {metrics.step} of {self._max_steps}  {note}")

    def _validation(self, progress: ValidationProgress) -> None:
        title = f"pictures @ {progress.step}" if progress.step else "pictures of base"
        self._draw(title, progress.num_done, progress.num_total, "")
        if progress.num_done == progress.num_total:
            self._line_once(f"{title}: {progress.num_done} done")

    def _scores(self, scores: ValidationScores) -> None:
        which = " EMA" if scores.weights == "ema" else ""
        self._say_once(
            f"CLIP score{which} @ {scores.step}: {scores.mean:.2f} over {scores.num_pictures} pictures "
            f"({scores.min:.2f} to {scores.max:.2f})"
        )

    def _evaluation(self, result: EvaluationResult) -> None:
        which = " EMA" if result.weights == "ema" else ""
        self._say_once(f"evaluation loss{which} @ {result.step}: {result.loss:.5f} on {result.dataset}")

    def _draw(self, title: str, done: int, total: int, note: str) -> None:
        if title not in self._tasks:
            self._tasks[title] = self._bars.add_task(title, total=total, note=note)
        self._bars.update(self._tasks[title], completed=done, total=total, note=escape(note))

    def _say(self, text: str, *, style: str | None = None) -> None:
        self._bars.console.print(text, style=style, markup=False)

    def _say_once(self, text: str) -> None:
        """Say something that a repeated event, after a reconnection or a restarted worker, must not repeat."""
        if text not in self._said:
            self._said.add(text)
            self._say(text)

    def _line_once(self, text: str) -> None:
        if not self._console.is_terminal:
            self._say_once(text)
