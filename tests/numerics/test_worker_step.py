"""One optimiser step of the worker: how its batch is split does not matter, and it is the step of the plain loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reverie_hidream.adapters import LokrAdapter, LokrConfig, attach_lokr
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.flow import sample_sigmas
from reverie_hidream.training.batch import Batch, BatchDraws
from reverie_hidream.training.step import NonFiniteLossError
from reverie_hidream.transformer import load_transformer, predict_velocity
from reverie_trainer.jobs.spec import Optimization
from reverie_trainer.worker.engine import TrainingEngine

Error = Callable[[torch.Tensor, torch.Tensor], float]

CONFIG = LokrConfig(factor=4)
NUM_SAMPLES = 4


@pytest.fixture
def samples(make_batch: Callable[..., Any]) -> Batch:
    """Four samples as one batch."""
    made = make_batch(8, 12, batch_size=NUM_SAMPLES, dtype=torch.float32)
    draws = torch.randn(NUM_SAMPLES, generator=torch.Generator().manual_seed(3))
    sigmas = sample_sigmas(draws, shift=3.0)
    return Batch(latents=made.latents, draws=BatchDraws(noise=made.noise, sigmas=sigmas), conditioning=made.text)


def _split(batch: Batch, size: int) -> list[Batch]:
    """The same samples in micro-batches of a size."""
    parts = [slice(first, first + size) for first in range(0, NUM_SAMPLES, size)]
    text = batch.conditioning
    return [
        Batch(
            latents=batch.latents[part],
            draws=BatchDraws(noise=batch.noise[part], sigmas=batch.draws.sigmas[part]),
            conditioning=TextConditioning(t5=text.t5[part], llama=text.llama[:, part], pooled=text.pooled[part]),
        )
        for part in parts
    ]


def _engine(checkpoint: Path, **optimization: Any) -> tuple[TrainingEngine, LokrAdapter]:
    transformer = load_transformer(checkpoint, dtype=torch.float32)
    adapter = attach_lokr(transformer, CONFIG, seed=1)
    fields = {"max_steps": 10, "learning_rate": 0.01, "max_grad_norm": 0.0, **optimization}
    return TrainingEngine(transformer, adapter, Optimization(**fields)), adapter


def _flat(adapter: LokrAdapter) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in adapter.raw_state().values()])


@pytest.mark.parametrize("size", [1, 2])
def test_the_split_of_a_step_does_not_matter(
    tiny_checkpoint: Path, samples: Batch, size: int, relative_error: Error
) -> None:
    whole, adapter = _engine(tiny_checkpoint, batch_size=NUM_SAMPLES)
    split, split_adapter = _engine(tiny_checkpoint, batch_size=size, gradient_accumulation_steps=NUM_SAMPLES // size)
    start = _flat(adapter)
    results = [(whole.train_step(1, [samples]), split.train_step(1, _split(samples, size))) for _ in range(2)]
    for one, other in results:
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-4)
    # AdamW divides by the gradient's size, which magnifies the rounding of the smallest ones.
    assert relative_error(_flat(split_adapter) - start, _flat(adapter) - start) < 1e-2


def test_equals_the_plain_loop(tiny_checkpoint: Path, samples: Batch, relative_error: Error) -> None:
    engine, adapter = _engine(tiny_checkpoint, batch_size=NUM_SAMPLES, max_grad_norm=0.05, grad_clip_method="norm")
    results = [engine.train_step(step, [samples]) for step in (1, 2, 3)]
    losses, expected = _plain_loop(tiny_checkpoint, samples, num_steps=3, max_norm=0.05)
    assert [result.loss for result in results] == pytest.approx(losses, rel=1e-5)
    assert relative_error(_flat(adapter), _flat(expected)) < 1e-5


def _plain_loop(
    checkpoint: Path, samples: Batch, *, num_steps: int, max_norm: float
) -> tuple[list[float], LokrAdapter]:
    transformer = load_transformer(checkpoint, dtype=torch.float32)
    adapter = attach_lokr(transformer, CONFIG, seed=1)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01, weight_decay=0.01, foreach=False)
    sigmas = samples.draws.sigmas
    levels = sigmas.view(-1, 1, 1, 1)
    noisy = (1 - levels) * samples.latents + levels * samples.noise
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        velocity = predict_velocity(transformer, noisy, 1000 * sigmas, samples.conditioning)
        loss = torch.nn.functional.mse_loss(velocity, samples.noise - samples.latents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), max_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses, adapter


@pytest.mark.parametrize("optimizer", ["adamw", "optimi-lion"])
def test_a_state_taken_up_continues_to_the_last_bit(tiny_checkpoint: Path, samples: Batch, optimizer: str) -> None:
    through, adapter = _engine(tiny_checkpoint, optimizer=optimizer)
    through.train_step(1, [samples])
    state = through.state()
    through.train_step(2, [samples])
    resumed, resumed_adapter = _engine(tiny_checkpoint, optimizer=optimizer)
    resumed.load_state(state)
    resumed.train_step(2, [samples])
    assert torch.equal(_flat(resumed_adapter), _flat(adapter))
    assert resumed.export({}) == through.export({})


def test_checkpointing_changes_no_bit(tiny_checkpoint: Path, samples: Batch) -> None:
    recomputed, adapter = _engine(tiny_checkpoint, gradient_checkpointing=True)
    kept, kept_adapter = _engine(tiny_checkpoint, gradient_checkpointing=False)
    assert recomputed.train_step(1, [samples]) == kept.train_step(1, [samples])
    assert torch.equal(_flat(adapter), _flat(kept_adapter))


def test_a_loss_that_is_no_number_changes_nothing(tiny_checkpoint: Path, samples: Batch) -> None:
    engine, adapter = _engine(tiny_checkpoint)
    start = _flat(adapter)
    samples.latents[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="step 1"):
        engine.train_step(1, [samples])
    assert torch.equal(_flat(adapter), start)
