"""The pictures that sum a job up."""

import json
from pathlib import Path

import pytest
from PIL import Image
from reverie.training.v1.job_pb2 import TrainingJob, ValidationPrompt
from reverie_client.report import (
    CELL_PIXELS,
    Metrics,
    draw_loss,
    draw_sheet,
    find_pictures,
    read_metrics,
    smooth,
)


@pytest.fixture
def job() -> TrainingJob:
    job = TrainingJob(job_id="job-0123456789ab")
    job.spec.name = "my-cat"
    for name in ("zebra", "my_cat-2"):
        job.spec.validation.prompts.append(ValidationPrompt(name=name, prompt=f"a photo of {name}, " * 20))
    return job


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for step in (0, 20, 100):
        for name in ("zebra", "my_cat-2"):
            for width, height in ((64, 64), (80, 48)):
                path = tmp_path / f"step_{step}_{name}_0_{width}x{height}.png"
                Image.new("RGB", (width, height), (step, 100, 50)).save(path)
    (tmp_path / "other.png").write_bytes(b"")
    return tmp_path


def test_reads_step_name_index_and_size_from_file_names(pictures: Path) -> None:
    found = find_pictures(pictures)
    assert len(found) == 12
    assert {(each.step, each.name, each.index) for each in found if each.width == 80} == {
        (step, name, 0) for step in (0, 20, 100) for name in ("zebra", "my_cat-2")
    }


def test_finds_nothing_where_there_is_no_folder(tmp_path: Path) -> None:
    assert find_pictures(tmp_path / "none") == []


def test_sheet_has_a_column_for_each_step_and_a_row_for_each_prompt_and_size(
    job: TrainingJob, pictures: Path, tmp_path: Path
) -> None:
    with Image.open(draw_sheet(job, find_pictures(pictures), tmp_path / "sheet.png")) as sheet:
        assert sheet.width // CELL_PIXELS == 3
        assert sheet.height == 32 + 2 * (24 + CELL_PIXELS + 8) + 2 * (24 + 154 + 8)
        # The first row is the job's first prompt; columns go by step as a number, 100 after 20.
        colours = [sheet.getpixel((8 + column * (CELL_PIXELS + 8) + 100, 150)) for column in range(3)]
    assert colours == [(0, 100, 50), (20, 100, 50), (100, 100, 50)]


def test_the_running_average_has_a_column_of_its_own_beside_its_step(
    job: TrainingJob, pictures: Path, tmp_path: Path
) -> None:
    for step in (20, 100):
        Image.new("RGB", (64, 64), (step, 0, 255)).save(pictures / f"step_{step}_zebra_0_64x64_ema.png")
    with Image.open(draw_sheet(job, find_pictures(pictures), tmp_path / "sheet.png")) as sheet:
        assert sheet.width // CELL_PIXELS == 5
        colours = [sheet.getpixel((8 + column * (CELL_PIXELS + 8) + 100, 150)) for column in range(5)]
    assert colours == [(0, 100, 50), (20, 100, 50), (20, 0, 255), (100, 100, 50), (100, 0, 255)]


def test_sheet_of_nothing_is_refused(job: TrainingJob, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no validation picture"):
        draw_sheet(job, [], tmp_path / "sheet.png")


def test_metrics_of_a_step_that_was_repeated_are_the_later_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "loss": 1.0, "learning_rate": 0.1}, {"step": 2, "loss": 2.0, "learning_rate": 0.2}]
    lines += [{"step": 2, "loss": 3.0, "learning_rate": 0.2}]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert read_metrics(path) == Metrics(steps=(1, 2), losses=(1.0, 3.0), learning_rates=(0.1, 0.2))


def test_loss_curve_is_a_picture(tmp_path: Path) -> None:
    metrics = Metrics(steps=(1, 2, 3), losses=(1.0, 0.5, 0.4), learning_rates=(1e-4, 2e-4, 2e-4))
    with Image.open(draw_loss("my-cat", metrics, tmp_path / "loss.png")) as picture:
        assert picture.width > 500


def test_loss_curve_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no step"):
        draw_loss("my-cat", Metrics(steps=(), losses=(), learning_rates=()), tmp_path / "loss.png")


def test_running_mean_of_a_constant_is_the_constant() -> None:
    assert smooth([2.0, 2.0, float("nan"), 2.0]) == pytest.approx([2.0, 2.0, 2.0, 2.0])
