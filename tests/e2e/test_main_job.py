"""The main job through four processes and a real S3 server: what it makes, and that it makes it again."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from lycoris import create_lycoris_from_weights
from PIL import Image
from reverie.training.v1.job_pb2 import TrainingJob, TrainingJobSpec, TrainingJobState
from reverie_client import SyncReverie
from reverie_client.specs import load_job_spec
from reverie_client.stack import Stack
from safetensors import safe_open

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
STEPS = 12
ADAPTER = "adapter/pytorch_lora_weights.safetensors"


def short_spec(dataset: str, *, name: str = "short") -> TrainingJobSpec:
    """The quickstart job, with fewer steps and smaller pictures."""
    spec = load_job_spec(QUICKSTART / "job.yaml")
    spec.name = name
    spec.datasets[0].dataset = dataset
    spec.optimization.max_steps = STEPS
    spec.optimization.lr_warmup_steps = 2
    spec.checkpoints.every_steps = 4
    spec.validation.every_steps = STEPS // 2
    spec.validation.num_inference_steps = 2
    del spec.validation.resolutions[:]
    spec.validation.resolutions.extend(["128x128", "192x128"])
    del spec.validation.prompts[1:]
    return spec


@pytest.fixture(scope="module")
def finished(reverie: SyncReverie, quickstart_dataset: str) -> TrainingJob:
    return reverie.jobs.result(reverie.jobs.submit(short_spec(quickstart_dataset)).job_id)


@pytest.fixture(scope="module")
def results(reverie: SyncReverie, finished: TrainingJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    reverie.jobs.fetch(finished.job_id, folder)
    return folder


def test_reports_what_it_did(finished: TrainingJob) -> None:
    photos = len(list((QUICKSTART / "photos").glob("*.jpg")))
    assert finished.step == STEPS
    assert finished.preparation.num_images == photos
    assert not finished.preparation.rejected
    assert len(finished.preparation.buckets) >= 3
    assert finished.adapter_report.num_modules == 32  # 8 Linear in each of 2 double blocks, 4 in each of 4 single ones
    assert {"prepare", "train", "finish"} <= {phase.name for phase in finished.phases}


def test_keeps_every_picture_at_the_size_asked_for(results: Path) -> None:
    pictures = {path.name: path for path in (results / "validation").glob("*.png")}
    sizes = {"128x128": (128, 128), "192x128": (192, 128)}
    expected = {f"step_{step}_cat_0_{size}.png": wh for step in (0, STEPS // 2, STEPS) for size, wh in sizes.items()}
    assert {name: size_of(path) for name, path in pictures.items()} == expected


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a picture."""
    with Image.open(path) as picture:
        return picture.size


def test_pictures_show_that_the_adapter_acts(results: Path) -> None:
    first = (results / "validation" / "step_0_cat_0_128x128.png").read_bytes()
    last = (results / "validation" / f"step_{STEPS}_cat_0_128x128.png").read_bytes()
    assert first != last


def test_adapter_carries_its_whole_configuration(results: Path) -> None:
    with safe_open(results / ADAPTER, "pt") as file:
        metadata, keys = file.metadata(), list(file.keys())
    config = json.loads(metadata["lycoris_config"])
    assert config["algo"] == "lokr"
    assert {"multiplier", "linear_dim", "linear_alpha", "factor"} <= set(config)
    assert metadata["modelspec.architecture"] == "hidream-full/lora"
    assert metadata["global_step"] == str(STEPS)
    assert "lycoris_double_stream_blocks_0_block_attn1_to_q.lokr_w1" in keys


def test_adapter_loads_in_lycoris_and_merged_equals_applied(results: Path, stack: Stack) -> None:
    base, applied, merged = (draw_with(stack, results / ADAPTER, how) for how in ("base", "apply", "merge"))
    assert (applied - base).norm() / base.norm() > 1e-3
    assert (merged - applied).norm() / base.norm() < 1e-4


def draw_with(stack: Stack, adapter: Path, how: str) -> torch.Tensor:
    """One forward of diffusers' own transformer, with the adapter by lycoris' own loader."""
    model = HiDreamImageTransformer2DModel.from_pretrained(
        stack.checkpoint, subfolder="transformer", dtype=torch.float32
    ).eval()
    if how != "base":
        network, _ = create_lycoris_from_weights(1.0, str(adapter), model)
        network.apply_to() if how == "apply" else network.merge_to()
    generator = torch.Generator().manual_seed(0)
    config = model.config
    layers = max(config.llama_layers) + 1
    with torch.no_grad():
        output: torch.Tensor = model(
            hidden_states=torch.randn(1, 16, 16, 16, generator=generator),
            timesteps=torch.tensor([500.0]),
            encoder_hidden_states_t5=torch.randn(1, 128, config.caption_channels[0], generator=generator),
            encoder_hidden_states_llama3=torch.randn(layers, 1, 128, config.caption_channels[1], generator=generator),
            pooled_embeds=torch.randn(1, config.text_emb_dim, generator=generator),
            return_dict=False,
        )[0]
    return output


def test_same_job_again_encodes_nothing_and_makes_the_same_bytes(
    reverie: SyncReverie, finished: TrainingJob, quickstart_dataset: str
) -> None:
    again = reverie.jobs.result(reverie.jobs.submit(short_spec(quickstart_dataset)).job_id)
    preparation = again.preparation
    assert preparation.num_images_cached == preparation.num_images
    assert preparation.num_prompts_cached == preparation.num_prompts
    assert again.adapter.sha256 == finished.adapter.sha256


def test_resumed_job_makes_the_same_bytes_as_one_never_stopped(
    reverie: SyncReverie, finished: TrainingJob, quickstart_dataset: str
) -> None:
    job_id = reverie.jobs.submit(short_spec(quickstart_dataset)).job_id
    for event in reverie.jobs.watch(job_id):
        if event.HasField("step") and event.step.step >= 3:
            break
    reverie.jobs.cancel(job_id)
    stopped = reverie.jobs.wait(job_id)
    assert stopped.state == TrainingJobState.TRAINING_JOB_STATE_CANCELLED
    assert 0 < stopped.step < STEPS
    reverie.jobs.resume(job_id)
    assert reverie.jobs.result(job_id).adapter.sha256 == finished.adapter.sha256


def test_grpcurl_submits_a_job_by_reflection(stack: Stack, reverie: SyncReverie, quickstart_dataset: str) -> None:
    grpcurl = shutil.which("grpcurl", path=str(Path(sys.executable).parent))
    assert grpcurl is not None
    line = next(line for line in readme_lines() if line.startswith("grpcurl"))
    body = line.split("'")[1]
    address = stack.addresses["trainer"]
    command = [grpcurl, "-plaintext", "-d", body, address, "reverie.training.v1.TrainingService/CreateTrainingJob"]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)
    # Python's reflection leaves json_name out, so grpcurl prints the field as the proto spells it.
    job = reverie.jobs.result(answer["job"]["job_id"])
    assert job.spec.name == "by-grpcurl"
    assert job.step == 4


def readme_lines() -> list[str]:
    """The README, line by line."""
    return (QUICKSTART.parents[1] / "README.md").read_text().splitlines()
