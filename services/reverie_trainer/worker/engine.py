"""One job's model in training: what the job says, as the settings of a training step and its optimiser (spec 3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import diffusers
import torch
from reverie_common.storage import RawTensor
from reverie_hidream.adapters.lokr import LokrAdapter
from reverie_hidream.optimizers import build_optimizer, learning_rate_at, load_optimizer_tensors, optimizer_tensors
from reverie_hidream.tensor_io import from_raw, to_raw
from reverie_hidream.training.batch import Batch
from reverie_hidream.training.objective import ObjectiveSettings, ReflexflowSettings, RolloutSettings
from reverie_hidream.training.step import StepResult, StepSettings, TrainingStep

from reverie_trainer.jobs.spec import Optimization

_ADAPTER, _OPTIMIZER = "adapter/", "optimizer/"


class TrainingEngine:
    """Owned by one thread."""

    def __init__(
        self,
        transformer: diffusers.HiDreamImageTransformer2DModel,
        adapter: LokrAdapter,
        optimization: Optimization,
    ) -> None:
        """Build the optimiser over the adapter, which must be attached.

        Raises:
            ValueError: the optimizer is unknown.
        """
        self._adapter = adapter
        self._optimization = optimization
        self._optimizer = build_optimizer(
            optimization.optimizer,
            adapter.parameters(),
            learning_rate=optimization.learning_rate,
            weight_decay=optimization.weight_decay,
        )
        self._step = TrainingStep(
            transformer, adapter, self._optimizer, step_settings(optimization), learning_rate=self._learning_rate
        )

    def train_step(self, step: int, batches: Iterable[Batch]) -> StepResult:
        """Take one optimiser step over `gradient_accumulation_steps` micro-batches. Blocks.

        Raises:
            NonFiniteLossError: nothing was changed.
        """
        return self._step.train_step(step, batches)

    def export(self, metadata: Mapping[str, str]) -> bytes:
        """The adapter as the file that LyCORIS and ComfyUI load (spec 4.6)."""
        return self._adapter.export(metadata)

    def state(self) -> dict[str, RawTensor]:
        """Everything that a resume needs besides the step: a copy, which training does not change."""
        adapter = {f"{_ADAPTER}{name}": tensor for name, tensor in self._adapter.raw_state().items()}
        optimizer = {f"{_OPTIMIZER}{name}": tensor for name, tensor in optimizer_tensors(self._optimizer).items()}
        return {name: to_raw(tensor.detach().clone()) for name, tensor in {**adapter, **optimizer}.items()}

    def load_state(self, state: Mapping[str, RawTensor], *, adapter_only: bool = False) -> None:
        """Take up what `state` gave, or of that the adapter alone.

        Raises:
            ValueError: it is that of another adapter or optimiser.
        """
        tensors = {name: from_raw(raw) for name, raw in state.items()}
        self._adapter.load_raw_state(_under(_ADAPTER, tensors))
        if not adapter_only:
            load_optimizer_tensors(self._optimizer, _under(_OPTIMIZER, tensors))

    def _learning_rate(self, step: int) -> float:
        return learning_rate_at(
            self._optimization.lr_scheduler,
            step,
            learning_rate=self._optimization.learning_rate,
            warmup_steps=self._optimization.lr_warmup_steps,
            max_steps=self._optimization.max_steps,
        )


def step_settings(optimization: Optimization) -> StepSettings:
    """The settings of a training step that a job's optimization describes."""
    return StepSettings(
        objective=objective_settings(optimization),
        gradient_accumulation_steps=optimization.gradient_accumulation_steps,
        gradient_checkpointing=optimization.gradient_checkpointing,
        max_grad_norm=optimization.max_grad_norm,
        grad_clip_method=optimization.grad_clip_method,
    )


def objective_settings(optimization: Optimization) -> ObjectiveSettings:
    """The objective that a job's optimization describes."""
    return ObjectiveSettings(
        **_same_fields(optimization, ObjectiveSettings, without="rollout"), rollout=_rollout(optimization)
    )


def _rollout(optimization: Optimization) -> RolloutSettings | None:
    sampling = optimization.scheduled_sampling
    if sampling is None:
        return None
    weights = sampling.reflexflow
    reflexflow = None if weights is None else ReflexflowSettings(**_same_fields(weights, ReflexflowSettings))
    return RolloutSettings(**_same_fields(sampling, RolloutSettings, without="reflexflow"), reflexflow=reflexflow)


def _same_fields(record: Any, record_class: type[Any], *, without: str = "") -> dict[str, Any]:
    """The values of a record's fields that another class has too."""
    return {item.name: getattr(record, item.name) for item in fields(record_class) if item.name != without}


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
