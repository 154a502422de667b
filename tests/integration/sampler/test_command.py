"""`reverie sample` against a sampler with real neighbours."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from reverie_client.cli.app import app
from reverie_hidream.clip_score import load_clip_scorer
from typer.testing import CliRunner, Result

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def run(stack: Any, folder: Path, *options: str) -> Result:
    command = ["sample", "a red circle", "--sampler", stack.target, "--size", "64x96", "--to", str(folder), *options]
    environment = {"REVERIE_STATE_DIR": str(folder / "state")}
    return await asyncio.to_thread(CliRunner().invoke, app, command, env=environment)


def read(path: str) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


async def test_writes_pictures_previews_and_scores(stack: Any, tmp_path: Path, tiny_clip: Path) -> None:
    options = ["--steps", "4", "--seed", "300", "-n", "2", "--preview-steps", "2", "--clip-score", "-o", "json"]
    options += ["--scheduler", "unipc", "--shift", "2.0", "--guidance-rescale", "0.5"]
    result = await run(stack, tmp_path, *options)
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    pictures = [read(path) for path in printed["files"]]
    assert [picture.size for picture in pictures] == [(64, 96)] * 2
    scorer = load_clip_scorer(tiny_clip)
    scores = [scorer.score(picture, "a red circle") for picture in pictures]
    assert printed["clip_scores"] == pytest.approx(scores, abs=1e-3)
    assert [Path(path).name for path in printed["previews"]] == [
        f"a-red-circle_{seed}_64x96_step{step:03d}.png" for seed in (300, 301) for step in (1, 2, 4)
    ]
    assert {read(path).size for path in printed["previews"]} == {(64, 96)}


async def test_says_the_score_beside_the_file(stack: Any, tmp_path: Path) -> None:
    result = await run(stack, tmp_path, "--steps", "1", "--clip-score")
    (line,) = result.stdout.splitlines()
    path, score = line.split("  CLIP ")
    assert read(path).size == (64, 96)
    assert 0.0 <= float(score) <= 100.0


async def test_an_unknown_scheduler_is_a_usage_error(stack: Any, tmp_path: Path) -> None:
    result = await run(stack, tmp_path, "--scheduler", "ddim")
    assert result.exit_code == 2
    assert "expected one of unipc, euler, flash" in " ".join(result.stderr.split())


@pytest.mark.parametrize(("option", "needed"), [("--step", "--job"), ("--strength", "--adapter")])
async def test_an_option_of_an_adapter_is_refused_without_one(
    stack: Any, tmp_path: Path, option: str, needed: str
) -> None:
    result = await run(stack, tmp_path, option, "3")
    assert result.exit_code == 2
    words = " ".join(result.stderr.split())
    assert f"{option}: it does nothing without" in words
    assert needed in words
