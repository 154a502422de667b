"""Optimisers, gradient release and the running average on a real transformer with its LoKr."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reverie_common.storage import unpack_tensors
from reverie_hidream.adapters import LokrAdapter, LokrConfig, attach_lokr
from reverie_hidream.flow import sample_sigmas
from reverie_hidream.optimizers import parameter_dtype
from reverie_hidream.training.batch import Batch, BatchDraws
from reverie_hidream.transformer import load_transformer
from reverie_trainer.jobs.spec import Ema, Optimization
from reverie_trainer.worker.engine import TrainingEngine

CONFIG = LokrConfig(factor=4, use_scalar=True)


@pytest.fixture
def batch(make_batch: Callable[..., Any]) -> Batch:
    """Two samples."""
    made = make_batch(8, 12, batch_size=2, dtype=torch.float32)
    sigmas = sample_sigmas(torch.randn(2, generator=torch.Generator().manual_seed(3)), shift=3.0)
    return Batch(latents=made.latents, draws=BatchDraws(noise=made.noise, sigmas=sigmas), conditioning=made.text)


@pytest.fixture
def make_engine(tiny_checkpoint: Path) -> Callable[..., tuple[TrainingEngine, LokrAdapter]]:
    """An engine over the tiny transformer with a LoKr that is not at its start."""

    def make(ema: Ema | None = None, **changes: Any) -> tuple[TrainingEngine, LokrAdapter]:
        optimization = Optimization(**{"max_steps": 10, "learning_rate": 0.01, "max_grad_norm": 0.01, **changes})
        transformer = load_transformer(tiny_checkpoint, dtype=torch.float32)
        adapter = attach_lokr(transformer, CONFIG, dtype=parameter_dtype(optimization.optimizer), seed=1)
        with torch.no_grad():
            for index, parameter in enumerate(adapter.parameters()):
                generator = torch.Generator().manual_seed(index)
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
        return TrainingEngine(transformer, adapter, optimization, ema=ema, seed=7), adapter

    return make


def flat(adapter: LokrAdapter) -> torch.Tensor:
    return torch.cat([tensor.flatten().float() for tensor in adapter.raw_state().values()])


@pytest.mark.parametrize("is_recomputed", [True, False])
def test_gradient_release_reaches_the_adapter_and_steps_to_the_same_bits(
    make_engine: Any, batch: Batch, is_recomputed: bool
) -> None:
    whole, whole_adapter = make_engine(gradient_checkpointing=is_recomputed)
    released, adapter = make_engine(gradient_checkpointing=is_recomputed, gradient_release=True)
    start = flat(adapter)
    results = [(whole.train_step(step, [batch]), released.train_step(step, [batch])) for step in (1, 2, 3)]

    assert torch.equal(flat(adapter), flat(whole_adapter))
    assert ((flat(adapter) - start).abs() > 0).float().mean() > 0.99
    assert all(parameter.grad is None for parameter in adapter.parameters())
    assert [other.loss for _, other in results] == [one.loss for one, _ in results]
    assert [other.gradient_norm for _, other in results] == pytest.approx([one.gradient_norm for one, _ in results])


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "prodigy", "learning_rate": 1.0, "optimizer_config": {"d0": "0.001"}},
        {"optimizer": "adamw_schedulefree"},
        {"optimizer": "bnb-lion8bit-paged", "learning_rate": 1e-3, "optimizer_config": {"min_8bit_size": "16"}},
        {"optimizer": "adamw_bf16"},
        {"optimizer": "adamw_bf16", "gradient_release": True},
        {"optimizer": "soap"},
        {"optimizer": "muon"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_state_taken_up_continues_to_the_last_bit(make_engine: Any, batch: Batch, changes: dict[str, Any]) -> None:
    ema = Ema(decay=0.9)
    through, adapter = make_engine(ema, **changes)
    through.train_step(1, [batch])
    through.train_step(2, [batch])
    state = through.state()
    through.train_step(3, [batch])
    resumed, resumed_adapter = make_engine(ema, **changes)
    resumed.load_state(state)
    resumed.train_step(3, [batch])

    assert torch.equal(flat(resumed_adapter), flat(adapter))
    assert resumed.export({}) == through.export({})
    assert resumed.export({}, "ema") == through.export({}, "ema")
    assert through.export({}, "ema") != through.export({})


def test_exporting_changes_nothing(make_engine: Any, batch: Batch) -> None:
    undisturbed, plain = make_engine(Ema(), optimizer="adamw_schedulefree")
    disturbed, exported = make_engine(Ema(), optimizer="adamw_schedulefree")
    for step in (1, 2, 3):
        undisturbed.train_step(step, [batch])
        disturbed.train_step(step, [batch])
        disturbed.export({})
        disturbed.export({}, "ema")

    assert torch.equal(flat(plain), flat(exported))


def test_the_exported_average_is_that_of_a_float64_loop(make_engine: Any, batch: Batch) -> None:
    engine, adapter = make_engine(Ema(decay=0.5))
    averages: dict[str, Any] = {}
    for step in range(1, 7):
        engine.train_step(step, [batch])
        decay = 0.0 if step == 1 else min(0.5, step / (9 + step))
        for name, tensor in adapter.raw_state().items():
            averages[name] = decay * averages.get(name, 0.0) + (1 - decay) * tensor.double().numpy()
    with engine.weights("ema"):
        held = {name: tensor.double().numpy() for name, tensor in adapter.raw_state().items()}
        expected = adapter.export({})

    assert max(np.abs(held[name] - averages[name]).max() for name in averages) < 1e-6
    assert engine.export({}, "ema") == expected
    assert unpack_tensors(expected).keys() == unpack_tensors(engine.export({})).keys()


def test_refuses_the_average_of_a_job_without_one(make_engine: Any) -> None:
    engine, _ = make_engine()

    with pytest.raises(ValueError, match="keeps no running average"):
        engine.export({}, "ema")


@pytest.mark.parametrize("adapter_only", [False, True])
def test_an_average_begins_with_the_adapter_of_a_job_that_kept_none(
    make_engine: Any, batch: Batch, adapter_only: bool
) -> None:
    first, _ = make_engine()
    first.train_step(1, [batch])
    second, _ = make_engine(Ema())
    second.load_state(first.state(), adapter_only=adapter_only)

    assert second.export({}, "ema") == second.export({}) == first.export({})


def test_the_schedule_is_followed_to_its_end(make_engine: Any, batch: Batch) -> None:
    engine, _ = make_engine(lr_scheduler="polynomial", lr_warmup_steps=2, lr_end=0.002, lr_power=2.0, max_steps=6)
    rates = [engine.train_step(step, [batch]).learning_rate for step in range(1, 7)]

    falling = [0.002 + 0.008 * (1 - k / 4) ** 2 for k in range(4)]
    assert rates == pytest.approx([0.005, 0.01, *falling])


def test_bfloat16_weights_stay_bfloat16_in_checkpoints(make_engine: Any, batch: Batch) -> None:
    engine, adapter = make_engine(optimizer="adamw_bf16")
    engine.train_step(1, [batch])

    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.bfloat16}
    assert {raw.dtype for name, raw in engine.state().items() if name.startswith("adapter/")} == {"BF16"}
