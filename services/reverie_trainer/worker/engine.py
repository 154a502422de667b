"""One job's model in training: what the job says, as the settings of a training step and its optimiser (spec 3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import diffusers
import torch
from reverie_common.storage import RawTensor
from reverie_hidream.adapters import TrainableAdapter
from reverie_hidream.ema import Ema, EmaSettings
from reverie_hidream.optimizers import UpdateSettings, build_update, learning_rate_at
from reverie_hidream.tensor_io import from_raw, to_raw
from reverie_hidream.training.batch import Batch
from reverie_hidream.training.evaluation import Evaluation, EvaluationBatch
from reverie_hidream.training.objective import ObjectiveSettings, ReflexflowSettings, RolloutSettings
from reverie_hidream.training.step import StepResult, StepSettings, TrainingStep

from reverie_trainer.jobs.spec import Ema as EmaChoice
from reverie_trainer.jobs.spec import Optimization

_ADAPTER, _OPTIMIZER, _EMA = "adapter/", "optimizer/", "ema/"


class TrainingEngine:
    """Owned by one thread."""

    def __init__(
        self,
        transformer: diffusers.HiDreamImageTransformer2DModel,
        adapter: TrainableAdapter,
        optimization: Optimization,
        *,
        ema: EmaChoice | None = None,
        seed: int = 0,
    ) -> None:
        """Build the optimiser over the adapter, which must be attached.

        Args:
            ema: the running average to keep; None is none.
            seed: the job's; decides how bfloat16 weights are rounded.

        Raises:
            ValueError: the optimizer is unknown.
        """
        self._adapter = adapter
        self._optimization = optimization
        self._update = build_update(adapter.parameters(), update_settings(optimization, seed=seed))
        self._ema = None if ema is None else Ema(adapter.named_parameters(), _ema_settings(ema))
        self._step = TrainingStep(
            transformer, adapter, self._update, step_settings(optimization), learning_rate=self._learning_rate
        )

    def train_step(self, step: int, batches: Iterable[Batch]) -> StepResult:
        """Take one optimiser step over `gradient_accumulation_steps` micro-batches. Blocks.

        Raises:
            NonFiniteLossError: the message says whether the adapter was changed.
        """
        result = self._step.train_step(step, batches)
        if self._ema is not None:
            with self._update.averaged():
                self._ema.update(step)
        return result

    @property
    def has_ema(self) -> bool:
        """Whether a running average is kept."""
        return self._ema is not None

    @contextmanager
    def weights(self, which: str = "adapter") -> Iterator[None]:
        """Hold the weights that are worth using in the adapter, to export, draw or measure them; without dropouts.

        Args:
            which: `adapter`, what a schedule-free optimiser averages and others train; `ema`, the running average.

        Raises:
            ValueError: the job keeps no running average.
        """
        self._adapter.train(False)
        try:
            with self._update.averaged(), self._swapped(which):
                yield
        finally:
            self._adapter.train(True)

    def evaluate(self, batches: Iterable[EvaluationBatch], num_timesteps: int, which: str = "adapter") -> Evaluation:
        """Measure the stable evaluation loss of the weights that are worth using; see `weights`. Blocks.

        Raises:
            ValueError: there is no batch.
        """
        with self.weights(which):
            return self._step.evaluate(batches, num_timesteps=num_timesteps)

    def _swapped(self, which: str) -> AbstractContextManager[None]:
        if which == "adapter":
            return nullcontext()
        if self._ema is None:
            raise ValueError("this job keeps no running average; give it `ema`")
        return self._ema.swapped()

    def export(self, metadata: Mapping[str, str], which: str = "adapter") -> bytes:
        """The adapter as the file that LyCORIS and ComfyUI load (spec 4.6); see `weights`."""
        with self.weights(which):
            return self._adapter.export(metadata)

    def state(self) -> dict[str, RawTensor]:
        """Everything that a resume needs besides the step: a copy, which training does not change."""
        adapter = {f"{_ADAPTER}{name}": tensor for name, tensor in self._adapter.raw_state().items()}
        optimizer = {f"{_OPTIMIZER}{name}": tensor for name, tensor in self._update.tensors().items()}
        average = {} if self._ema is None else {f"{_EMA}{name}": tensor for name, tensor in self._ema.state().items()}
        return {name: to_raw(tensor.detach().clone()) for name, tensor in {**adapter, **optimizer, **average}.items()}

    def load_state(self, state: Mapping[str, RawTensor], *, adapter_only: bool = False) -> None:
        """Take up what `state` gave, or of that the adapter alone.

        Raises:
            ValueError: it is that of another adapter or optimiser.
        """
        tensors = {name: from_raw(raw) for name, raw in state.items()}
        self._adapter.load_raw_state(_under(_ADAPTER, tensors))
        if not adapter_only:
            self._update.load_tensors(_under(_OPTIMIZER, tensors))
        self._load_average({} if adapter_only else _under(_EMA, tensors))

    def _load_average(self, state: Mapping[str, torch.Tensor]) -> None:
        if self._ema is None:
            return
        if state:
            self._ema.load_state(state)
        else:
            # From another job that kept none.
            with self._update.averaged():
                self._ema.restart()

    def _learning_rate(self, step: int) -> float:
        return learning_rate_at(
            self._optimization.lr_scheduler,
            step,
            learning_rate=self._optimization.learning_rate,
            warmup_steps=self._optimization.lr_warmup_steps,
            max_steps=self._optimization.max_steps,
            end=self._optimization.lr_end,
            power=self._optimization.lr_power,
            num_cycles=self._optimization.lr_num_cycles,
        )


def step_settings(optimization: Optimization) -> StepSettings:
    """The settings of a training step that a job's optimization describes."""
    return StepSettings(
        objective=objective_settings(optimization),
        gradient_accumulation_steps=optimization.gradient_accumulation_steps,
        gradient_checkpointing=optimization.gradient_checkpointing,
    )


def update_settings(optimization: Optimization, *, seed: int) -> UpdateSettings:
    """How a job's optimization steps the adapter.

    Raises:
        ValueError: gradient release with something that needs all gradients.
    """
    return UpdateSettings(
        optimizer=optimization.optimizer,
        learning_rate=optimization.learning_rate,
        weight_decay=optimization.weight_decay,
        beta1=optimization.beta1,
        beta2=optimization.beta2,
        options=optimization.optimizer_config,
        clip_method=optimization.grad_clip_method,
        clip_limit=optimization.max_grad_norm,
        gradient_accumulation_steps=optimization.gradient_accumulation_steps,
        gradient_release=optimization.gradient_release,
        seed=seed,
    )


def _ema_settings(ema: EmaChoice) -> EmaSettings:
    return EmaSettings(decay=ema.decay, update_interval=ema.update_interval, warmup_steps=ema.warmup_steps)


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
