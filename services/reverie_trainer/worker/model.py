"""Loading the frozen model, and putting a job's adapter on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from reverie_hidream.adapters import TrainableAdapter, attach_adapter
from reverie_hidream.checkpoint import require_parts
from reverie_hidream.memory import set_checkpointing_interval
from reverie_hidream.optimizers import parameter_dtype
from reverie_hidream.quantise import check_precision
from reverie_hidream.training.batch import Batch
from reverie_hidream.transformer import load_transformer

from reverie_trainer.worker.adapter_file import adapter_config
from reverie_trainer.worker.engine import TrainingEngine
from reverie_trainer.worker.job import LeasedJob


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedAdapter:
    """What is left of a trained model when it is out of memory."""

    file: bytes
    """As exported (spec 4.6)."""
    ema_file: bytes | None
    """The running average, where the job keeps one."""
    probe_batch: Batch
    output: torch.Tensor
    """What the trained model makes of the batch, see proof.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLoader:
    """Loads the base model of one job, as often as asked."""

    checkpoint: Path
    device: torch.device
    job: LeasedJob

    def load_base(self) -> diffusers.HiDreamImageTransformer2DModel:
        """The frozen transformer, quantised if the job wants that. Blocks for seconds to minutes.

        Raises:
            NotFoundError: the checkpoint has no transformer, or a part of it.
            ValueError: the precision is unknown, or the device cannot train on it.
        """
        require_parts(self.checkpoint, ["transformer"])
        model, memory = self.job.spec.model, self.job.spec.memory
        check_precision(model.base_precision, is_trained_on=True, device=self.device)
        transformer = load_transformer(
            self.checkpoint,
            device=self.device,
            dtype=self.job.dtype,
            precision=model.base_precision,
            quantize_via=model.quantize_via,
            num_offloaded_blocks=memory.num_offloaded_blocks,
        )
        set_checkpointing_interval(transformer, memory.gradient_checkpointing_interval)
        return transformer

    def attach(self, transformer: diffusers.HiDreamImageTransformer2DModel) -> TrainableAdapter:
        """Put the job's adapter on a transformer; its start is a function of the job's seed.

        Raises:
            AdapterMatchesNothingError: no module is selected.
            AdapterConfigError: a setting does not work on this model.
        """
        dtype = parameter_dtype(self.job.spec.optimization.optimizer)
        return attach_adapter(transformer, adapter_config(self.job.adapter), dtype=dtype, seed=self.job.spec.seed)

    def engine(
        self, transformer: diffusers.HiDreamImageTransformer2DModel, adapter: TrainableAdapter
    ) -> TrainingEngine:
        """Everything that one training step needs."""
        return TrainingEngine(
            transformer, adapter, self.job.spec.optimization, ema=self.job.spec.ema, seed=self.job.spec.seed
        )
