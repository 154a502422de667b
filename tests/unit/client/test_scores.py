"""CLIP scores as a file."""

import json
import math
from pathlib import Path

import pytest
from reverie.training.v1.job_pb2 import ValidationImage
from reverie.training.v1.measures_pb2 import EvaluationResult, TimestepLoss
from reverie_client.scores import summarise_scores, write_evaluations, write_scores


def image(step: int, name: str, score: float | None, weights: str = "adapter") -> ValidationImage:
    return ValidationImage(step=step, prompt_name=name, width=64, height=32, weights=weights, clip_score=score)


def test_each_step_and_kind_of_weights_is_summed_up() -> None:
    images = [image(5, "a", 20.0), image(5, "b", 26.0), image(0, "a", 10.0), image(5, "a", 21.0, "ema")]
    lines = summarise_scores(images)
    assert [(line["step"], line["weights"], line["mean"]) for line in lines] == [
        (0, "adapter", 10.0),
        (5, "adapter", 23.0),
        (5, "ema", 21.0),
    ]
    assert (lines[1]["min"], lines[1]["max"]) == (20.0, 26.0)
    assert lines[1]["std"] == pytest.approx(math.sqrt(((20 - 23) ** 2 + (26 - 23) ** 2) / 2))
    assert lines[1]["pictures"][1] == {"prompt_name": "b", "size": "64x32", "image_index": 0, "clip_score": 26.0}


def test_the_file_has_a_line_for_each_and_is_not_written_without_scores(tmp_path: Path) -> None:
    assert write_scores([image(0, "a", None)], tmp_path) is None
    path = write_scores([image(0, "a", 1.0), image(9, "a", 2.0)], tmp_path)
    assert path == tmp_path / "validation" / "scores.jsonl"
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 9]


def test_evaluation_losses_are_written_with_their_curves(tmp_path: Path) -> None:
    assert write_evaluations([], tmp_path) is None
    curve = [TimestepLoss(timestep=1000.0, loss=0.75), TimestepLoss(timestep=2.5, loss=0.25)]
    result = EvaluationResult(step=7, dataset="held-out", loss=0.5, weights="ema", timesteps=curve)
    path = write_evaluations([result], tmp_path)
    assert path == tmp_path / "evaluation.jsonl"
    points = [{"timestep": 1000.0, "loss": 0.75}, {"timestep": 2.5, "loss": 0.25}]
    expected = {"step": 7, "dataset": "held-out", "weights": "ema", "loss": 0.5, "timesteps": points}
    assert [json.loads(line) for line in path.read_text().splitlines()] == [expected]
