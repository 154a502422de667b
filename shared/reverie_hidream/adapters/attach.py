"""A new adapter of any kind on a transformer."""

from __future__ import annotations

import torch
from torch import nn

from reverie_hidream.adapters.adapter import TrainableAdapter
from reverie_hidream.adapters.config import AdapterConfig, FullRankConfig, LoraConfig
from reverie_hidream.adapters.full_rank import attach_full_rank
from reverie_hidream.adapters.lokr import attach_lycoris
from reverie_hidream.adapters.lora import attach_lora


def attach_adapter(
    transformer: nn.Module, config: AdapterConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> TrainableAdapter:
    """Put a new adapter of any kind on a frozen transformer.

    Args:
        dtype: of the trainable tensors of an adapter beside the weights; full rank trains the weights as they are.
        seed: start and dropouts are functions of it; torch's global generator is not touched.

    Raises:
        AdapterMatchesNothingError: the configuration selects no module.
        AdapterConfigError: the kind or one of its settings does not work on this model.
    """
    if isinstance(config, FullRankConfig):
        return attach_full_rank(transformer)
    if isinstance(config, LoraConfig):
        return attach_lora(transformer, config, dtype=dtype, seed=seed)
    return attach_lycoris(transformer, config, dtype=dtype, seed=seed)
