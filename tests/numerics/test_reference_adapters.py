"""The guide's LyCORIS files, unchanged, and every other kind of adapter: trained, resumed exactly, exported, proven."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reverie_hidream.adapters import (
    FullRankConfig,
    LokrConfig,
    LoraConfig,
    LycorisConfig,
    TrainableAdapter,
    attach_adapter,
    load_adapter,
)
from reverie_hidream.adapters.config import AdapterConfig
from reverie_hidream.flow import sample_sigmas
from reverie_hidream.training.batch import Batch, BatchDraws
from reverie_hidream.transformer import load_transformer
from reverie_trainer.jobs.spec import Optimization
from reverie_trainer.worker.engine import TrainingEngine
from reverie_trainer.worker.proof import NothingLearntError, probe, prove_export
from safetensors.torch import load

REFERENCE = Path(__file__).parent / "reference"


def reference(file: str, *more_classes: str) -> LokrConfig:
    """A file of the guide as it is, trailing commas included; `more_classes` as the guide's text adds them."""
    text = re.sub(r",(\s*[}\]])", r"\1", (REFERENCE / file).read_text())
    config = json.loads(text)
    if more_classes:
        config["apply_preset"]["target_module"] += more_classes
    return LokrConfig.from_dict(config)


# 2 double blocks with 8 projections and 4 single ones with 4; 3 Linears in each of (4 experts + 1 shared) and ff_t.
VARIANTS: dict[str, tuple[LokrConfig, int]] = {
    "attention": (reference("lycoris_config.json"), 2 * 8 + 4 * 4),
    "feed-forward": (reference("lycoris_config.json", "FeedForward"), 32 + 6 * 15 + 2 * 3),
    "names": (reference("lycoris_config.names.json"), 32 + 2 * 3 + 6 * 3),
}
KINDS: dict[str, AdapterConfig] = {
    **{name: config for name, (config, _) in VARIANTS.items()},
    "lokr-dropouts": LokrConfig(factor=4, dropout=0.2, rank_dropout=0.2, module_dropout=0.2, dora_wd=True),
    "lokr-start": LokrConfig(factor=4, init_lokr_norm=1e-3),
    "locon": LycorisConfig(algo="locon", linear_dim=4, dropout=0.2, rank_dropout=0.2),
    "dylora": LycorisConfig(algo="dylora", linear_dim=8),
    "diag-oft": LycorisConfig(algo="diag-oft", linear_dim=4),
    "lora": LoraConfig(rank=4, dropout=0.3),
    "full-rank": FullRankConfig(),
}


@pytest.fixture
def batches(make_batch: Callable[..., Any]) -> list[Batch]:
    """Two micro-batches."""
    made = []
    for seed in (1, 2):
        sample = make_batch(8, 12, batch_size=2, dtype=torch.float32)
        draws = torch.randn(2, generator=torch.Generator().manual_seed(seed))
        noise = BatchDraws(noise=sample.noise, sigmas=sample_sigmas(draws, shift=3.0))
        made.append(Batch(latents=sample.latents, draws=noise, conditioning=sample.text))
    return made


class Run:
    """A model in training."""

    def __init__(self, checkpoint: Path, config: AdapterConfig, precision: str = "no_change") -> None:
        self.transformer = load_transformer(checkpoint, dtype=torch.float32, precision=precision)
        self.adapter: TrainableAdapter = attach_adapter(self.transformer, config, seed=3)
        optimization = Optimization(max_steps=10, learning_rate=0.003, gradient_accumulation_steps=2)
        self.engine = TrainingEngine(self.transformer, self.adapter, optimization)


@pytest.mark.parametrize("name", KINDS)
def test_a_resumed_run_ends_in_the_same_bits_and_its_file_is_proven(
    name: str, tiny_checkpoint: Path, batches: list[Batch]
) -> None:
    through = Run(tiny_checkpoint, KINDS[name])
    start = through.adapter.raw_state()
    through.engine.train_step(1, batches)
    state = through.engine.state()
    losses = [through.engine.train_step(step, batches).loss for step in (2, 3)]
    resumed = Run(tiny_checkpoint, KINDS[name])
    resumed.engine.load_state(state)

    assert [resumed.engine.train_step(step, batches).loss for step in (2, 3)] == losses
    file = through.engine.export({})
    assert resumed.engine.export({}) == file
    # Every module learns; a scalar's first step is what lets its factors move.
    assert all(not torch.equal(tensor, start[key]) for key, tensor in through.adapter.raw_state().items())

    with through.engine.weights():
        output = probe(through.transformer, batches[0])
    proof = prove_export(
        file,
        trained_output=output,
        load_base=lambda: load_transformer(tiny_checkpoint, dtype=torch.float32),
        batch=batches[0],
    )
    assert proof.change > 1e-5
    assert proof.picture_change > 1e-5
    assert proof.difference <= proof.tolerance


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_the_guide_s_files_select_the_same_on_any_base(
    name: str, precision: str, tiny_checkpoint: Path, batches: list[Batch]
) -> None:
    config, num_modules = VARIANTS[name]
    run = Run(tiny_checkpoint, config, precision)

    assert run.adapter.num_modules == num_modules
    before = run.engine.train_step(1, batches).loss
    assert run.engine.train_step(2, batches).loss != before
    keys = load(run.engine.export({}))
    first = "lycoris_double_stream_blocks_0_block_attn1_to_q"
    assert {key.rpartition(".")[2] for key in keys if key.startswith(f"{first}.")} == {"alpha", "lokr_w1", "lokr_w2"}
    assert float(keys[f"{first}.alpha"]) == 16384


def test_every_weight_of_the_model_trains_at_full_rank(tiny_checkpoint: Path, batches: list[Batch]) -> None:
    run = Run(tiny_checkpoint, FullRankConfig())
    names = [name for name, _ in run.transformer.named_parameters()]

    run.engine.train_step(1, batches)

    assert list(run.adapter.named_parameters()) == names
    original = load_transformer(tiny_checkpoint, dtype=torch.float32)
    moved = [
        name for name, tensor in original.named_parameters() if not torch.equal(tensor, run.adapter.raw_state()[name])
    ]
    assert moved == names


def test_a_full_rank_model_gives_its_base_back_to_the_last_bit(tiny_checkpoint: Path, batches: list[Batch]) -> None:
    base = probe(load_transformer(tiny_checkpoint, dtype=torch.float32), batches[0])
    run = Run(tiny_checkpoint, FullRankConfig())
    run.engine.train_step(1, batches)
    trained, file = probe(run.transformer, batches[0]), run.engine.export({})

    run.adapter.set_strength(0.0)
    assert torch.equal(probe(run.transformer, batches[0]), base)
    run.adapter.set_strength(1.0)
    assert torch.equal(probe(run.transformer, batches[0]), trained)

    other = load_transformer(tiny_checkpoint, dtype=torch.float32)
    loaded = load_adapter(other, file)
    assert torch.equal(probe(other, batches[0]), trained)
    loaded.detach()
    assert torch.equal(probe(other, batches[0]), base)


def test_an_adapter_that_learnt_nothing_is_refuted(tiny_checkpoint: Path, batches: list[Batch]) -> None:
    run = Run(tiny_checkpoint, LokrConfig(factor=4))

    with pytest.raises(NothingLearntError, match=r"picture of a fixed prompt by 0.00e\+00: it learnt nothing"):
        prove_export(
            run.engine.export({}),
            trained_output=probe(run.transformer, batches[0]),
            load_base=lambda: load_transformer(tiny_checkpoint, dtype=torch.float32),
            batch=batches[0],
        )
