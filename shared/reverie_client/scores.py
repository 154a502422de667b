"""A job's measures as files, an object for each step and kind of weights.

CLIP scores are `validation/scores.jsonl`, evaluation losses with their curves `evaluation.jsonl`.
"""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from reverie.training.v1.job_pb2 import ValidationImage
from reverie.training.v1.measures_pb2 import EvaluationResult

SCORES_PATH = "validation/scores.jsonl"
EVALUATIONS_PATH = "evaluation.jsonl"


def write_evaluations(results: Iterable[EvaluationResult], folder: Path) -> Path | None:
    """Write evaluation losses below a job's folder; returns the file, None where nothing was measured."""
    lines = [_evaluation(result) for result in results]
    if not lines:
        return None
    path = folder / EVALUATIONS_PATH
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _evaluation(result: EvaluationResult) -> dict[str, Any]:
    curve = [{"timestep": each.timestep, "loss": each.loss} for each in result.timesteps]
    return {
        "step": result.step,
        "dataset": result.dataset,
        "weights": result.weights,
        "loss": result.loss,
        "timesteps": curve,
    }


def write_scores(images: Iterable[ValidationImage], folder: Path) -> Path | None:
    """Write the scores of pictures below a job's folder; returns the file, None where no picture was scored."""
    lines = summarise_scores(images)
    if not lines:
        return None
    path = folder / SCORES_PATH
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def summarise_scores(images: Iterable[ValidationImage]) -> list[dict[str, Any]]:
    """Return step, weights, mean, min, max and std over the pictures of each step, and each picture's own score."""
    rounds: dict[tuple[int, str], list[ValidationImage]] = {}
    for image in images:
        if image.HasField("clip_score"):
            rounds.setdefault((image.step, image.weights), []).append(image)
    return [_summary(step, weights, scored) for (step, weights), scored in sorted(rounds.items())]


def _summary(step: int, weights: str, images: list[ValidationImage]) -> dict[str, Any]:
    scores = [image.clip_score for image in images]
    return {
        "step": step,
        "weights": weights,
        "mean": statistics.fmean(scores),
        "min": min(scores),
        "max": max(scores),
        "std": statistics.pstdev(scores),
        "pictures": [
            {
                "prompt_name": image.prompt_name,
                "size": f"{image.width}x{image.height}",
                "image_index": image.image_index,
                "clip_score": image.clip_score,
            }
            for image in images
        ],
    }
