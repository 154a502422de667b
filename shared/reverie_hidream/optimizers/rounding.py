"""AdamW of torchao without compilation: quantised state, and bfloat16 weights that are rounded stochastically.

Imported only where one of these is asked for: torchao takes a second to load, and the rest works without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8
from torchao.optim.adam import _AdamW, single_param_adam

from reverie_hidream.randomness import Draw


class _EagerStep(torch.optim.Optimizer):
    """torchao's step without `torch.compile`, which would need a C++ or Triton compiler where the worker runs."""

    _new_buffer: Callable[[torch.Tensor, bool], torch.Tensor]
    bf16_stochastic_round: bool

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the gradients are there
        """Step every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(group, parameter)

    def _step_one(self, group: dict[str, Any], parameter: torch.nn.Parameter) -> None:
        state = self.state[parameter]
        if not state:
            self._begin(state, parameter, amsgrad=group["amsgrad"])
        state["step"] += 1
        single_param_adam(
            parameter.detach(),
            parameter.grad,
            state["step"],
            state["exp_avg"],
            state["exp_avg_sq"],
            state.get("max_exp_avg_sq"),
            group["lr"],
            *group["betas"],
            group["weight_decay"],
            group["eps"],
            True,
            self.bf16_stochastic_round and parameter.dtype is torch.bfloat16,
        )

    def _begin(self, state: dict[str, Any], parameter: torch.nn.Parameter, *, amsgrad: bool) -> None:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = self._new_buffer(parameter, True)
        state["exp_avg_sq"] = self._new_buffer(parameter, False)
        if amsgrad:
            state["max_exp_avg_sq"] = self._new_buffer(parameter, False)


class EagerAdamW8bit(_EagerStep, AdamW8bit):  # type: ignore[misc]  # torchao is untyped
    """State in 8 bits."""


class EagerAdamW4bit(_EagerStep, AdamW4bit):  # type: ignore[misc]  # torchao is untyped
    """State in 4 bits."""


class EagerAdamWFp8(_EagerStep, AdamWFp8):  # type: ignore[misc]  # torchao is untyped
    """State in fp8."""


class StochasticAdamW(_EagerStep, _AdamW):  # type: ignore[misc]  # torchao is untyped
    """AdamW over bfloat16 weights: each step is computed in float32 and rounded up or down by chance, without bias.

    Rounding to nearest would drop every step below 2**-9 of a weight. The numbers that decide are a function of
    (seed, step, index of the parameter), so that a resumed job rounds the same way; torch's generators are left as they
    were. Moments are float32: in bfloat16 the second one, which moves by a thousandth a step, would stand still.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], *, seed: int, first_index: int = 0, **settings: Any
    ) -> None:
        """Make the optimiser.

        Args:
            parameters: bfloat16, otherwise there is nothing to round.
            first_index: index of the first parameter among all of the adapter's.
        """
        ordered = list(parameters)
        super().__init__(ordered, **settings, bf16_stochastic_round=True)  # type: ignore[call-arg]  # torchao's own
        self._draw = Draw(seed=seed, stream="rounding")
        self._indices = {parameter: first_index + index for index, parameter in enumerate(ordered)}

    def _new_buffer(self, parameter: torch.Tensor, signed: bool) -> torch.Tensor:  # noqa: ARG002 - torchao's signature
        return torch.zeros_like(parameter, dtype=torch.float32)

    def _step_one(self, group: dict[str, Any], parameter: torch.nn.Parameter) -> None:
        num_done = int(self.state[parameter]["step"].item()) if self.state[parameter] else 0
        devices = [parameter.device] if parameter.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self._draw.integer(num_done + 1, self._indices[parameter], 2**63))
            super()._step_one(group, parameter)
