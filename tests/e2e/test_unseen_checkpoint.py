"""A checkpoint of HiDream's shape, other in every respect, trains through all services without a change of code."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from lycoris import create_lycoris_from_weights
from PIL import Image
from reverie.encoder.v1.encoder_pb2 import Encoder
from reverie.training.v1.job_pb2 import TrainingJob
from reverie_client import SyncReverie
from reverie_client.specs import load_job_spec
from reverie_client.stack import Stack, StackOptions
from reverie_hidream.tiny import TinyShape, make_tiny_checkpoint

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ADAPTER = "adapter/pytorch_lora_weights.safetensors"

UNSEEN = TinyShape(
    num_double_blocks=1,
    num_single_blocks=3,
    num_heads=3,
    rope_axes=(12, 8, 4),
    num_experts=3,
    num_active_experts=2,
    # 144 tokens, so 36,864 pixels.
    max_resolution=(24, 24),
    clip_l_width=40,
    clip_g_width=24,
    t5_width=72,
    llama_width=56,
    num_llama_heads=4,
    num_llama_layers=7,
    llama_layers=(1, 3, 3, 5),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("unseen") / "checkpoint", shape=UNSEEN)


@pytest.fixture(scope="module")
def reverie(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncReverie]:
    """The SDK, connected to a stack of this checkpoint."""
    options = StackOptions(state_dir=tmp_path_factory.mktemp("stack"), checkpoint=str(checkpoint))
    with Stack(options.with_ephemeral_ports()) as stack:
        addresses = stack.addresses
        with SyncReverie(
            addresses["trainer"], encoder=addresses["encoder"], vae=addresses["vae"], sampler=addresses["sampler"]
        ) as connected:
            yield connected


@pytest.fixture(scope="module")
def finished(reverie: SyncReverie, tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    """Three steps on a single picture, which is not square."""
    folder = tmp_path_factory.mktemp("pictures")
    with Image.open(EXAMPLES / "quickstart" / "photos" / "coffee.jpg") as photo:
        photo.save(folder / "coffee.jpg")
    (folder / "coffee.txt").write_text("a cup of espresso on a wooden table")
    reverie.datasets.create("unseen")
    reverie.datasets.upload_folder("unseen", folder)
    spec = load_job_spec(EXAMPLES / "quickstart" / "job.yaml")
    spec.datasets[0].dataset = "unseen"
    # Above the canvas, which is 192 x 192 pixels.
    spec.datasets[0].resolution = 1024
    spec.optimization.max_steps = 3
    spec.optimization.lr_warmup_steps = 0
    spec.optimization.use_load_balancing_loss = True
    spec.validation.every_steps = 0
    spec.validation.num_inference_steps = 2
    del spec.validation.prompts[1:]
    del spec.validation.resolutions[:]
    spec.validation.resolutions.append("128x64")
    return reverie.jobs.result(reverie.jobs.submit(spec).job_id)


def test_trains_within_its_own_canvas(finished: TrainingJob) -> None:
    assert finished.step == 3
    (bucket,) = finished.preparation.buckets
    assert bucket.width > bucket.height
    assert bucket.width * bucket.height <= 24 * 24 // 4 * 16 * 16
    # 8 Linear in the double block's attention and 4 in each of the single ones'.
    assert finished.adapter_report.num_modules == 8 + 3 * 4
    assert len(finished.metrics.expert_load) == 3


def test_every_encoder_gives_its_own_width(reverie: SyncReverie) -> None:
    widths = {Encoder.Name(part.encoder): part.shape[-1] for part in reverie.encoders.describe()}
    assert widths == {"ENCODER_CLIP_L": 40, "ENCODER_CLIP_G": 24, "ENCODER_T5": 72, "ENCODER_LLAMA": 56}


def test_its_pictures_are_drawn_at_the_size_asked_for(
    reverie: SyncReverie, finished: TrainingJob, tmp_path: Path
) -> None:
    reverie.jobs.fetch(finished.job_id, tmp_path)
    pictures = sorted((tmp_path / "validation").glob("*.png"))
    assert [path.name for path in pictures] == ["step_0_cat_0_128x64.png", "step_3_cat_0_128x64.png"]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()
    with Image.open(pictures[0]) as picture:
        assert picture.size == (128, 64)


def test_its_adapter_loads_in_lycoris_on_diffusers_own_module(
    reverie: SyncReverie, finished: TrainingJob, checkpoint: Path, tmp_path: Path
) -> None:
    reverie.jobs.fetch(finished.job_id, tmp_path)
    base, applied, merged = (_draw(checkpoint, tmp_path / ADAPTER, how) for how in ("base", "apply", "merge"))
    assert (applied - base).norm() / base.norm() > 1e-3
    assert (merged - applied).norm() / base.norm() < 1e-4


@torch.no_grad()
def _draw(checkpoint: Path, adapter: Path, how: str) -> torch.Tensor:
    model = HiDreamImageTransformer2DModel.from_pretrained(
        checkpoint, subfolder="transformer", dtype=torch.float32
    ).eval()
    if how != "base":
        network, _ = create_lycoris_from_weights(1.0, str(adapter), model)
        network.apply_to() if how == "apply" else network.merge_to()
    generator = torch.Generator().manual_seed(0)
    output: torch.Tensor = model(
        hidden_states=torch.randn(1, 16, 8, 12, generator=generator),
        timesteps=torch.tensor([500.0]),
        encoder_hidden_states_t5=torch.randn(1, 16, UNSEEN.t5_width, generator=generator),
        encoder_hidden_states_llama3=torch.randn(7, 1, 16, UNSEEN.llama_width, generator=generator),
        pooled_embeds=torch.randn(1, UNSEEN.clip_l_width + UNSEEN.clip_g_width, generator=generator),
        return_dict=False,
    )[0]
    return output
