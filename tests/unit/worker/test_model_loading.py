"""The worker loads its base as the job says: precision, where it is quantised, what waits, what is recomputed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from reverie_hidream.memory import checkpointing_interval, host_blocks
from reverie_hidream.quantise import weight_bytes
from reverie_hidream.transformer import load_transformer
from reverie_trainer.jobs.spec import JobSpec, Memory, ModelChoice
from reverie_trainer.worker.job import LeasedJob
from reverie_trainer.worker.model import ModelLoader


def loader(checkpoint: Path, **changes: Any) -> ModelLoader:
    """A loader of a job; of the leased job it reads nothing else."""
    job = SimpleNamespace(spec=JobSpec(**changes), dtype=torch.bfloat16)
    return ModelLoader(checkpoint=checkpoint, device=torch.device("cpu"), job=cast("LeasedJob", job))


@pytest.mark.parametrize("precision", ["int8-torchao", "nf4-bnb"])
def test_holds_the_base_in_the_precision(tiny_checkpoint: Path, precision: str) -> None:
    model = ModelChoice(base_precision=precision, quantize_via="cpu")
    base = loader(tiny_checkpoint, model=model).load_base()
    assert weight_bytes(base) == weight_bytes(load_transformer(tiny_checkpoint, precision=precision))
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_blocks_wait_on_the_host_and_others_are_recomputed(tiny_checkpoint: Path) -> None:
    memory = Memory(num_offloaded_blocks=3, gradient_checkpointing_interval=2)
    base = loader(tiny_checkpoint, memory=memory).load_base()
    host = host_blocks(base)
    assert host is not None
    assert host.indices == (1, 3, 5)
    assert checkpointing_interval(base) == 2


def test_nothing_waits_unless_asked(tiny_checkpoint: Path) -> None:
    base = loader(tiny_checkpoint).load_base()
    assert host_blocks(base) is None
    assert checkpointing_interval(base) == 1


def test_refuses_what_cannot_be_trained_on(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="'int8dq-torchao' cannot be trained on"):
        loader(tiny_checkpoint, model=ModelChoice(base_precision="int8dq-torchao")).load_base()
