"""One optimiser step over an adapter, from the learning rate to the freed gradient: whole or by parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import torch
from reverie_common.optimizer_catalogue import find_optimizer

from reverie_hidream.optimizers.averaging import averaged_weights
from reverie_hidream.optimizers.builders import build_optimizer, set_learning_rate
from reverie_hidream.optimizers.clipping import clamp_gradients, clip_gradients, gradient_absmax
from reverie_hidream.optimizers.state import load_optimizer_tensors, optimizer_tensors


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient is infinite or not a number; the message says whether the adapter was changed."""


class GradientFigures(NamedTuple):
    """What one step was, read by the host."""

    loss: float
    norm: float
    """Of the whole gradient, before clipping."""
    absmax: float
    """Largest element of the gradient, before clipping."""
    others: tuple[float, ...] = ()
    """What else the caller wanted to have read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateSettings:
    """How an adapter is stepped."""

    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    """The full rate; `begin` sets that of a step."""
    weight_decay: float | None = None
    """None is the optimiser's own, as for the betas."""
    beta1: float | None = None
    beta2: float | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    """Settings of the optimiser by name, as text."""
    clip_method: str = "value"
    clip_limit: float = 2.0
    """0 clips nothing."""
    gradient_accumulation_steps: int = 1
    gradient_release: bool = False
    """Step each parameter in the backward pass and free its gradient at once."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what gradient release cannot do.

        Raises:
            ValueError: it is asked for with something that needs all gradients, or the optimizer is unknown.
        """
        if not self.gradient_release:
            return
        if not find_optimizer(self.optimizer).can_release:
            raise ValueError(f"gradient_release: {self.optimizer} needs all gradients at once; use adamw")
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_release: {self.gradient_accumulation_steps} micro-batches would be as many steps; "
                "set gradient_accumulation_steps to 1"
            )
        if self.clip_method == "norm" and self.clip_limit > 0:
            raise ValueError("gradient_release: the norm needs all gradients at once; clip by value, or set 0")


class AdapterUpdate(Protocol):
    """An optimiser over an adapter's parameters, and one step of it. Owned by one thread.

    A step is `begin`, for each micro-batch `accept` and backward, and `finish`.
    """

    def begin(self, learning_rate: float) -> None:
        """Start a step; there are no gradients yet."""

    def accept(self, loss: torch.Tensor) -> None:
        """Look at a loss before its backward pass.

        Raises:
            NonFiniteLossError: the backward pass would spoil the adapter; nothing was changed.
        """

    def finish(self, loss: torch.Tensor, others: Sequence[torch.Tensor] = ()) -> GradientFigures:
        """End a step, which has stepped every parameter and has no gradients any more.

        Args:
            loss: () sum of the micro-batches' shares.
            others: () each; read together with the loss, so that the host waits once.

        Raises:
            NonFiniteLossError: the message says whether the adapter was changed.
        """

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a resume needs besides the parameters; copies on the CPU."""

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take up what `tensors` gave.

        Raises:
            ValueError: it is of another optimiser or adapter.
        """

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the weights that are worth using in the parameters: those that a schedule-free optimiser averages."""


def build_update(parameters: Sequence[torch.nn.Parameter], settings: UpdateSettings) -> AdapterUpdate:
    """The update that the settings describe, over parameters of the dtype that the optimiser wants.

    Raises:
        ValueError: unknown optimizer or setting.
    """
    return _ReleasedUpdate(parameters, settings) if settings.gradient_release else _WholeUpdate(parameters, settings)


def _optimizer_of(
    parameters: Sequence[torch.nn.Parameter], settings: UpdateSettings, *, first_index: int = 0
) -> torch.optim.Optimizer:
    return build_optimizer(
        settings.optimizer,
        parameters,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        beta1=settings.beta1,
        beta2=settings.beta2,
        options=settings.options,
        seed=settings.seed,
        first_index=first_index,
    )


def _read(
    loss: torch.Tensor, norm: torch.Tensor, absmax: torch.Tensor, others: Sequence[torch.Tensor]
) -> GradientFigures:
    """The only time in a step that the host waits for the device."""
    values = torch.stack([tensor.to(loss) for tensor in (loss, norm, absmax, *others)]).tolist()
    return GradientFigures(values[0], values[1], values[2], tuple(values[3:]))


class _WholeUpdate:
    """All parameters in one step, when all gradients are there."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], settings: UpdateSettings) -> None:
        self._parameters = list(parameters)
        self._settings = settings
        self._optimizer = _optimizer_of(self._parameters, settings)

    def begin(self, learning_rate: float) -> None:
        set_learning_rate(self._optimizer, learning_rate)

    def accept(self, loss: torch.Tensor) -> None:
        """Nothing to do: `finish` looks at the sum, and the host need not wait for the device before."""

    def finish(self, loss: torch.Tensor, others: Sequence[torch.Tensor] = ()) -> GradientFigures:
        absmax = gradient_absmax(self._parameters)
        norm = clip_gradients(self._parameters, self._settings.clip_method, self._settings.clip_limit)
        figures = _read(loss, norm, absmax, others)
        if not (math.isfinite(figures.loss) and math.isfinite(figures.norm)):
            self._optimizer.zero_grad(set_to_none=True)
            raise NonFiniteLossError(
                f"the loss is {figures.loss}, the norm of its gradient {figures.norm}; the adapter is unchanged"
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return figures

    def tensors(self) -> dict[str, torch.Tensor]:
        return optimizer_tensors(self._optimizer)

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        load_optimizer_tensors(self._optimizer, tensors)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        with averaged_weights(self._optimizer):
            yield


class _ReleasedUpdate:
    """Each parameter steps in the backward pass as soon as its gradient is there, which is freed at once.

    Every parameter has an optimiser of its own, as one over all would look at all of them each time.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], settings: UpdateSettings) -> None:
        self._settings = settings
        self._optimizers = [
            _optimizer_of([parameter], settings, first_index=index) for index, parameter in enumerate(parameters)
        ]
        self._norms: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for index, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._release, index))

    def begin(self, learning_rate: float) -> None:
        self._norms.clear()
        for optimizer in self._optimizers:
            set_learning_rate(optimizer, learning_rate)

    def accept(self, loss: torch.Tensor) -> None:
        # The host waits here: after the backward pass it would be too late.
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteLossError(f"the loss is {value}; the adapter is unchanged")

    def finish(self, loss: torch.Tensor, others: Sequence[torch.Tensor] = ()) -> GradientFigures:
        norm = absmax = torch.zeros_like(loss)
        if self._norms:
            # In the parameters' order, as clip_gradients does, not in that of the backward pass.
            norms, largest = zip(*(self._norms[index] for index in sorted(self._norms)), strict=True)
            norm = torch.linalg.vector_norm(torch.stack(norms))
            absmax = torch.stack(largest).max()
        figures = _read(loss, norm, absmax, others)
        if not math.isfinite(figures.norm):
            raise NonFiniteLossError(
                f"the norm of the gradient is {figures.norm}, and gradient_release has taken the step already: the "
                "adapter is spoilt; go on from the last checkpoint"
            )
        return figures

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{index:05d}/{name}": tensor
            for index, optimizer in enumerate(self._optimizers)
            for name, tensor in optimizer_tensors(optimizer).items()
        }

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        parts: dict[str, dict[str, torch.Tensor]] = {f"{index:05d}": {} for index in range(len(self._optimizers))}
        for key, tensor in tensors.items():
            part, separator, name = key.partition("/")
            if not separator or part not in parts:
                raise ValueError(
                    f"optimiser state {key!r} belongs to none of the {len(parts)} parameters, or was saved without "
                    "gradient_release; resume with the same setting"
                )
            parts[part][name] = tensor
        for optimizer, part_tensors in zip(self._optimizers, parts.values(), strict=True):
            load_optimizer_tensors(optimizer, part_tensors)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        with ExitStack() as stack:
            for optimizer in self._optimizers:
                stack.enter_context(averaged_weights(optimizer))
            yield

    def _release(self, index: int, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        self._norms[index] = (
            torch.linalg.vector_norm(gradient),
            torch.linalg.vector_norm(gradient, math.inf).float(),
        )
        if self._settings.clip_limit:
            clamp_gradients([gradient], self._settings.clip_limit)
        self._optimizers[index].step()
        parameter.grad = None
