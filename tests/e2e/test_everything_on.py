"""As many features as can be on together in one job, through all services: each leaves its trace, and none the resume.

What each feature does on its own is held elsewhere; this is where they meet.
"""

import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from PIL import Image, ImageDraw, ImageOps
from reverie.training.v1.job_pb2 import (
    AdapterSpec,
    StepMetrics,
    TrainingJob,
    TrainingJobEvent,
    TrainingJobSpec,
    TrainingJobState,
)
from reverie_client import SyncReverie
from reverie_client.folder import read_folders
from reverie_client.specs import load_job_spec
from safetensors.torch import load_file

PHOTOS = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "photos"
PICTURES = {
    "subject": ("cat", "cat_upright", "coffee"),
    "others": ("astronaut", "clock", "grass"),
    "held-out": ("rocket", "gravel"),
}
STEPS, STOPPED = 8, 4
# Of the subject and of the others; two samples in each step.
STEPS_PER_EPOCH = (2 * 3 + 3) / 2


@pytest.fixture(scope="module")
def datasets(reverie: SyncReverie, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A subject with masks, pictures of other things, and pictures that are only measured."""
    root = tmp_path_factory.mktemp("pictures")
    for name, stems in PICTURES.items():
        folder, masks = root / name, root / f"{name}-masks"
        folder.mkdir()
        masks.mkdir()
        for stem in stems:
            shutil.copy(PHOTOS / f"{stem}.jpg", folder)
            shutil.copy(PHOTOS / f"{stem}.txt", folder)
            _draw_mask(folder / f"{stem}.jpg", masks / f"{stem}.png")
        reverie.datasets.create(f"everything-{name}")
        reverie.datasets.upload(
            f"everything-{name}", read_folders([folder], masks=masks if name == "subject" else None)
        )


def _draw_mask(picture: Path, mask: Path) -> None:
    """White in the middle half of the picture as it is shown, black around it."""
    with Image.open(picture) as opened:
        width, height = ImageOps.exif_transpose(opened).size
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).rectangle((width // 4, height // 4, 3 * width // 4, 3 * height // 4), fill=255)
    image.save(mask)


def everything() -> TrainingJobSpec:
    return load_job_spec(Path(__file__).with_name("everything_on.yaml"))


@pytest.fixture(scope="module")
def events(reverie: SyncReverie, datasets: None) -> list[TrainingJobEvent]:
    """The history of the job from its first to its last event."""
    return list(reverie.jobs.watch(reverie.jobs.submit(everything()).job_id))


@pytest.fixture(scope="module")
def finished(reverie: SyncReverie, events: list[TrainingJobEvent]) -> TrainingJob:
    return reverie.jobs.result(events[0].snapshot.job_id)


@pytest.fixture(scope="module")
def steps(reverie: SyncReverie, finished: TrainingJob) -> tuple[StepMetrics, ...]:
    return reverie.jobs.metrics(finished.job_id)


def of_kind(events: list[TrainingJobEvent], kind: str) -> list[Any]:
    return [getattr(event, kind) for event in events if event.HasField(kind)]  # type: ignore[arg-type]  # a field's name


def test_preparation_makes_masks_and_says_what_compact_storage_changed(
    events: list[TrainingJobEvent], finished: TrainingJob
) -> None:
    last = {progress.stage: progress for progress in of_kind(events, "preparation")}
    assert list(last) == ["inspect", "encode_prompts", "encode_images", "encode_masks"]
    assert last["encode_masks"].num_done == len(PICTURES["subject"])
    assert not finished.preparation.rejected
    errors = {error.encoder: error.max for error in finished.preparation.embedding_errors}
    assert errors.keys() == {"t5", "llama"}
    assert all(0 < error < 0.02 for error in errors.values())


def test_steps_carry_the_figures_of_every_part_of_the_objective(steps: tuple[StepMetrics, ...]) -> None:
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    kept = [step.regularisation_loss for step in steps if step.HasField("regularisation_loss")]
    assert 0 < len(kept) <= STEPS
    assert all(step.load_balancing_loss > 0.9 and step.router_entropy > 0 for step in steps)
    assert all(sum(step.expert_load) == pytest.approx(1.0, abs=1e-5) for step in steps)
    assert 0 < sum(step.rollout_share for step in steps) < STEPS
    # Warm-up, then a cosine.
    rates = [step.learning_rate for step in steps]
    assert rates[:2] == pytest.approx([0.005, 0.01])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert [step.epoch for step in steps] == pytest.approx(
        [number / STEPS_PER_EPOCH for number in range(1, STEPS + 1)], abs=1e-6
    )


def test_adapter_and_average_are_two_files(finished: TrainingJob) -> None:
    assert finished.adapter_report.num_modules == 32
    assert finished.adapter.sha256 != finished.ema_adapter.sha256
    assert finished.ema_adapter.size_bytes == finished.adapter.size_bytes


def test_held_out_pictures_are_measured_with_both_weights(events: list[TrainingJobEvent]) -> None:
    measured = [(result.step, result.weights) for result in of_kind(events, "evaluation")]
    assert measured == [(0, "adapter"), (4, "adapter"), (4, "ema"), (8, "adapter"), (8, "ema")]
    losses = [result.loss for result in of_kind(events, "evaluation")]
    assert len(set(losses)) == len(losses)
    assert all(len(result.timesteps) == 2 for result in of_kind(events, "evaluation"))


def test_pictures_have_their_prompt_s_strength_and_a_comparison(
    reverie: SyncReverie, events: list[TrainingJobEvent], finished: TrainingJob, tmp_path: Path
) -> None:
    reverie.jobs.fetch(finished.job_id, tmp_path)
    pictures = {path.stem: path.read_bytes() for path in (tmp_path / "validation").glob("*.png")}
    names = ["step_0_{}_0_64x80", "step_8_{}_0_64x80", "step_8_{}_0_64x80_ema"]
    assert pictures.keys() == {name.format(prompt) for name in names for prompt in ("full", "without")}
    full, without = ([pictures[name.format(prompt)] for name in names] for prompt in ("full", "without"))
    assert len(set(full)) == 3
    assert len(set(without)) == 1
    shown = Counter((preview.step, preview.prompt_name) for preview in of_kind(events, "validation_preview"))
    assert shown == {(step, prompt): 2 for step in (0, 8) for prompt in ("full", "without")}
    assert not of_kind(events, "validation_scores")


def test_checkpoints_come_with_epochs(reverie: SyncReverie, finished: TrainingJob) -> None:
    crossed = {next(step for step in range(1, STEPS + 1) if step / STEPS_PER_EPOCH >= half / 2) for half in (1, 2, 3)}
    assert {checkpoint.step for checkpoint in reverie.jobs.checkpoints(finished.job_id)} == {*crossed, STEPS}


def test_curves_are_written_for_tensorboard(reverie: SyncReverie, finished: TrainingJob) -> None:
    deadline = time.monotonic() + 30
    while not (found := [path for path in paths(reverie, finished) if path.startswith("tracking/tensorboard/")]):
        assert time.monotonic() < deadline, "no TensorBoard file within 30 s of the end of the job"
    assert found


def paths(reverie: SyncReverie, job: TrainingJob) -> list[str]:
    return [artifact.path for artifact in reverie.jobs.artifacts(job.job_id)]


def test_what_is_told_is_what_was_asked_for(events: list[TrainingJobEvent]) -> None:
    assert [notice.reason for notice in of_kind(events, "notice")] == ["EMBEDDINGS_CHANGED", "ADAPTER_PROVEN"]


def test_cancelled_and_resumed_it_ends_in_the_same_bits(
    reverie: SyncReverie, finished: TrainingJob, steps: tuple[StepMetrics, ...]
) -> None:
    job_id = reverie.jobs.submit(everything()).job_id
    for event in reverie.jobs.watch(job_id):
        if event.HasField("step") and event.step.step >= STOPPED:
            break
    reverie.jobs.cancel(job_id)
    stopped = reverie.jobs.wait(job_id)
    assert stopped.state == TrainingJobState.TRAINING_JOB_STATE_CANCELLED
    assert STOPPED <= stopped.step < STEPS
    reverie.jobs.resume(job_id)
    done = reverie.jobs.result(job_id)
    assert done.adapter.sha256 == finished.adapter.sha256
    assert done.ema_adapter.sha256 == finished.ema_adapter.sha256
    assert [step.loss for step in reverie.jobs.metrics(job_id)] == [step.loss for step in steps]
    assert [result.loss for result in done.evaluations] == [result.loss for result in finished.evaluations]


@pytest.mark.parametrize(
    ("adapter", "first_key"),
    [
        pytest.param(
            {"lora": {"rank": 4, "alpha": 2, "dropout": 0.1}},
            "transformer.double_stream_blocks.0.block.attn1.to_q.lora_A.weight",
            id="lora",
        ),
        pytest.param(
            {"lycoris": {"algo": "locon", "linear_dim": 4, "linear_alpha": 2, "use_scalar": True, "rank_dropout": 0.1}},
            "lycoris_double_stream_blocks_0_block_attn1_to_q.lora_down.weight",
            id="locon",
        ),
    ],
)
def test_other_adapters_meet_everything_too(
    adapter: dict[str, Any], first_key: str, reverie: SyncReverie, datasets: None, tmp_path: Path
) -> None:
    spec = everything()
    spec.adapter.CopyFrom(ParseDict(adapter, AdapterSpec()))
    spec.optimization.max_steps = 3
    spec.evaluation.every_steps = 0
    spec.ClearField("validation")
    done = reverie.jobs.result(reverie.jobs.submit(spec).job_id)
    assert done.step == 3
    assert done.adapter_report.num_modules > 0
    assert done.adapter.sha256 != done.ema_adapter.sha256
    assert {result.weights for result in done.evaluations} == {"adapter", "ema"}
    reverie.jobs.fetch(done.job_id, tmp_path)
    for name in ("pytorch_lora_weights", "ema_pytorch_lora_weights"):
        tensors = load_file(tmp_path / "adapter" / f"{name}.safetensors")
        assert first_key in tensors
        assert all(tensor.isfinite().all() for tensor in tensors.values())
