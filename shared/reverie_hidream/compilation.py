"""The velocity's computation through `torch.compile`; where that does not work, as it is, with the reason."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch

from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.transformer import predict_velocity

logger = logging.getLogger(__name__)

_MAX_CHARACTERS = 300


class CompiledPrediction:
    """Predicts velocities as `predict_velocity` does. For one thread."""

    def __init__(self, *, backend: str | Callable[..., Any] = "inductor") -> None:
        """Nothing is compiled before the first call.

        Args:
            backend: of torch.compile; `inductor` needs a C++ compiler on a CPU and Triton on a GPU.
        """
        self._backend = backend
        self._compiled: Callable[..., torch.Tensor] | None = None
        self._problem: str | None = None

    @property
    def problem(self) -> str | None:
        """Why velocities are computed without compiling; None while compiling works."""
        return self._problem

    def __call__(
        self,
        transformer: diffusers.HiDreamImageTransformer2DModel,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: TextConditioning,
    ) -> torch.Tensor:
        """See `predict_velocity`. The first call of a size takes seconds to minutes."""
        if self._problem is None:
            # A second of import that a service which compiles nothing does not pay for.
            from torch._dynamo.exc import TorchDynamoException

            try:
                return self._compute(transformer, latents, timesteps, conditioning)
            except TorchDynamoException as error:
                self._problem = " ".join(str(error).split())[:_MAX_CHARACTERS]
                logger.warning("the transformer cannot be compiled here: %s", self._problem)
        return predict_velocity(transformer, latents, timesteps, conditioning)

    def _compute(self, *arguments: Any) -> torch.Tensor:
        if self._compiled is None:
            # Not for fixed shapes: how many tokens each expert gets changes with every step.
            self._compiled = torch.compile(predict_velocity, backend=self._backend)
        with warnings.catch_warnings():
            # It traces through our cache of attention plans, whose values depend on their keys alone.
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`", UserWarning)
            warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex", UserWarning)
            return self._compiled(*arguments)
