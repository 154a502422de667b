"""A new adapter of any kind on a transformer."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import nn

from reverie_hidream.adapters.adapter import TrainableAdapter
from reverie_hidream.adapters.config import LokrConfig, LycorisConfig
from reverie_hidream.adapters.lokr import attach_lycoris

AdapterConfig: TypeAlias = LokrConfig | LycorisConfig


def attach_adapter(
    transformer: nn.Module, config: AdapterConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> TrainableAdapter:
    """Put a new adapter of any kind on a frozen transformer.

    Args:
        dtype: of the trainable tensors of an adapter beside the weights.
        seed: start and dropouts are functions of it; torch's global generator is not touched.

    Raises:
        AdapterMatchesNothingError: the configuration selects no module.
        AdapterConfigError: the kind or one of its settings does not work on this model.
    """
    return attach_lycoris(transformer, config, dtype=dtype, seed=seed)
