"""The training of the tiny HiDream: exact to resume, loadable by the loaders of the real one, and small."""

from pathlib import Path

import pytest
import torch
from reverie_hidream.shapes.architecture import MAX_BYTES, Architecture, build_vae, num_parameters
from reverie_hidream.shapes.encoding import encode_captions
from reverie_hidream.shapes.evaluate import DrawingSettings, evaluate, load_painter
from reverie_hidream.shapes.journal import read_log
from reverie_hidream.shapes.latents import LatentPool, prepare_latents
from reverie_hidream.shapes.state import read_tensors
from reverie_hidream.shapes.train_model import STATE_FILE, ModelSettings, ModelTraining
from reverie_hidream.shapes.train_vae import STATE_FILE as VAE_STATE_FILE
from reverie_hidream.shapes.train_vae import VaeSettings, VaeTraining, load_trained_vae

SMALL = Architecture(
    vae_channels=(8, 8, 8, 8), width=32, num_heads=2, num_double_blocks=1, num_single_blocks=2, num_llama_layers=2
)
VAE = VaeSettings(architecture=SMALL, num_steps=3, batch_size=2, warmup_steps=1, log_every=1)
MODEL = ModelSettings(architecture=SMALL, num_steps=3, batch_size=2, warmup_steps=1, log_every=1, num_scenes=40)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> LatentPool:
    vae = build_vae(SMALL, seed=0).eval()
    return prepare_latents(tmp_path_factory.mktemp("latents"), vae, seed=0, num_scenes=40, run={})


def test_the_checkpoint_is_small_enough() -> None:
    assert 2 * sum(num_parameters(Architecture()).values()) < MAX_BYTES - 200_000


def test_a_resumed_vae_is_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    VaeTraining(tmp_path / "whole", VAE).run()
    VaeTraining(tmp_path / "cut", VAE).run(until=2)
    VaeTraining(tmp_path / "cut", VAE).run()
    _assert_same(tmp_path / "whole" / VAE_STATE_FILE, tmp_path / "cut" / VAE_STATE_FILE)
    assert [entry["step"] for entry in read_log(tmp_path / "cut" / "vae.jsonl")] == [1, 2, 3]


def test_an_unfinished_vae_is_refused(tmp_path: Path) -> None:
    VaeTraining(tmp_path, VAE).run(until=1)
    with pytest.raises(ValueError, match="after step 1 of 3"):
        load_trained_vae(tmp_path, VAE)


@pytest.mark.parametrize("trains_encoders", [True, False])
def test_a_resumed_model_is_that_of_an_uninterrupted_run(
    tmp_path: Path, pool: LatentPool, trains_encoders: bool
) -> None:
    settings = ModelSettings(
        architecture=SMALL,
        num_steps=3,
        batch_size=2,
        warmup_steps=1,
        num_scenes=40,
        trains_encoders=trains_encoders,
    )
    ModelTraining(tmp_path / "whole", settings, pool).run()
    ModelTraining(tmp_path / "cut", settings, pool).run(until=2)
    ModelTraining(tmp_path / "cut", settings, pool).run()
    _assert_same(tmp_path / "whole" / STATE_FILE, tmp_path / "cut" / STATE_FILE)


def test_a_run_with_other_settings_is_refused(tmp_path: Path, pool: LatentPool) -> None:
    ModelTraining(tmp_path, MODEL, pool).run(until=1)
    with pytest.raises(ValueError, match="balance_weight"):
        ModelTraining(tmp_path, ModelSettings(architecture=SMALL, num_steps=3, balance_weight=0.5), pool)


def test_training_moves_experts_gates_and_encoders(tmp_path: Path, pool: LatentPool) -> None:
    training = ModelTraining(tmp_path, MODEL, pool)
    before = {name: tensor.clone() for name, tensor in training.transformer.state_dict().items()}
    words = training.encoders["t5"].shared.weight.detach().clone()
    training.run()
    after = training.transformer.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if "experts" in name or "gate" in name} <= moved
    assert not torch.equal(words, training.encoders["t5"].shared.weight)


def test_the_checkpoint_is_loaded_and_drawn_by_the_real_loaders(tmp_path: Path, pool: LatentPool) -> None:
    training = ModelTraining(tmp_path, MODEL, pool)
    checkpoint = training.export(tmp_path / "checkpoint", build_vae(SMALL, seed=0))
    painter = load_painter(checkpoint)
    captions = ["a large red circle on a green background", "", "a zorp"]
    expected = encode_captions(training.encoders, captions)
    # The file holds bfloat16.
    torch.testing.assert_close(painter.encode(captions).t5, expected.t5, rtol=0.05, atol=0.1)
    torch.testing.assert_close(painter.encode(captions).llama, expected.llama, rtol=0.05, atol=0.1)
    torch.testing.assert_close(painter.encode(captions).pooled, expected.pooled, rtol=0.05, atol=0.1)
    quality = evaluate(painter, num_captions=2, num_seeds=1, settings=DrawingSettings(num_inference_steps=2))
    assert quality.num_pictures == 2
    assert len(quality.expert_load) == 3


def _assert_same(first: Path, second: Path) -> None:
    whole, whole_header = read_tensors(first)
    cut, cut_header = read_tensors(second)
    assert whole_header == cut_header
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
