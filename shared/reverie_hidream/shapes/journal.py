"""What a training run leaves for a person: a log of JSON lines, a line of progress, and a plot of the loss."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SMOOTHED_OVER = 50


class Journal:
    """Keeps `<name>.jsonl` in a directory. Owned by one thread."""

    def __init__(self, directory: Path, name: str, *, step: int, num_steps: int) -> None:
        """Go on with the log after a step; lines of later steps, which were lost with their state, are dropped.

        Args:
            step: steps done.
            num_steps: of the whole run.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._path, self._plot_path, self._name = directory / f"{name}.jsonl", directory / f"{name}.png", name
        self._num_steps, self._first_step, self._started = num_steps, step, time.monotonic()
        kept = [entry for entry in read_log(self._path) if entry["step"] <= step]
        self._path.write_text("".join(f"{json.dumps(entry)}\n" for entry in kept), encoding="utf-8")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Add a line to the log, and show the progress on stderr."""
        seconds = time.monotonic() - self._started
        per_step = seconds / max(1, step - self._first_step)
        entry = {
            "step": step,
            **{name: round(value, 6) for name, value in figures.items()},
            "seconds": round(seconds, 1),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(entry)}\n")
        shown = " ".join(f"{name} {value:.4g}" for name, value in figures.items())
        remaining = (self._num_steps - step) * per_step
        sys.stderr.write(
            f"{self._name} {step}/{self._num_steps} {shown} | {per_step:.3f} s a step, {_clock(remaining)} left\n"
        )
        sys.stderr.flush()

    def plot(self) -> bool:
        """Draw the loss beside the log, where matplotlib is installed; returns whether it is."""
        if importlib.util.find_spec("matplotlib") is None:
            return False
        plot_log(self._path, self._plot_path)
        return True


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot_log(path: Path, target: Path) -> None:
    """Draw the loss of a log over its steps, and its running mean."""
    # Only a run that is plotted needs it.
    from matplotlib.figure import Figure

    entries = read_log(path)
    steps, losses = [entry["step"] for entry in entries], [entry["loss"] for entry in entries]
    figure = Figure(figsize=(8, 4.5))
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#b8c4d6", linewidth=0.8, label="loss")
    axes.plot(steps, _running_mean(losses), color="#1f4e9c", linewidth=1.6, label=f"mean of {_SMOOTHED_OVER} lines")
    axes.set(xlabel="step", ylabel="loss", title=path.stem)
    axes.legend()
    figure.savefig(target, dpi=120)


def _running_mean(values: list[float]) -> list[float]:
    windows = (values[max(0, end - _SMOOTHED_OVER) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
