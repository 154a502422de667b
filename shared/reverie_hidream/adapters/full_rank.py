"""Full-rank tuning: every weight of the transformer is trained, sharded over the ranks where there are several.

The weights stay in the dtype in which they were loaded, gradients and optimizer included. A copy of the base lies in
host memory, so that its predictions can be had back to the last bit (regularisation, comparisons).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from reverie_common.storage.tensors import pack_tensors
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from reverie_hidream.adapters.adapter import check_state
from reverie_hidream.adapters.branch import is_plain
from reverie_hidream.adapters.config import AdapterConfigError
from reverie_hidream.memory import blocks_of
from reverie_hidream.tensor_io import to_raw

logger = logging.getLogger(__name__)

FORMAT_KEY = "format"
FULL_RANK_MARK = "reverie.full_rank"
"""Metadata of a file that holds a whole transformer."""


class FullRankAdapter:
    """All weights of a transformer, changed in place."""

    def __init__(self, transformer: nn.Module, *, is_trained: bool) -> None:
        """Take the weights as they are now for the base."""
        self._transformer = transformer
        self._parameters = dict(transformer.named_parameters())
        self._base = {name: _local(tensor).detach().cpu().clone() for name, tensor in self._parameters.items()}
        self._trained: dict[str, torch.Tensor] | None = None
        self._strength = 1.0
        self._is_trained = is_trained

    @property
    def selected(self) -> list[str]:
        """Names of the Linears; norms and gates are changed too."""
        return [name for name, module in self._transformer.named_modules() if isinstance(module, nn.Linear)]

    @property
    def num_modules(self) -> int:
        """See TrainableAdapter."""
        return len(self.selected)

    @property
    def num_parameters(self) -> int:
        """See TrainableAdapter."""
        return sum(tensor.numel() for tensor in self._parameters.values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """See TrainableAdapter: names of the model's state dict."""
        return dict(self._parameters) if self._is_trained else {}

    def parameters(self) -> list[nn.Parameter]:
        """See TrainableAdapter."""
        return list(self.named_parameters().values())

    def raw_state(self) -> dict[str, torch.Tensor]:
        """See TrainableAdapter; gathers shards, so every rank must call it."""
        return {name: _whole(tensor).detach().cpu().clone() for name, tensor in self._parameters.items()}

    @torch.no_grad()
    def load_raw_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """See TrainableAdapter."""
        check_state(self._parameters, state)
        for name, tensor in self._parameters.items():
            _write(tensor, state[name])

    def export(self, metadata: Mapping[str, str] | None = None, *, dtype: torch.dtype | None = None) -> bytes:
        """The whole transformer as one file, in the weights' own dtype unless asked otherwise."""
        tensors = {
            name: to_raw(tensor if dtype is None else tensor.to(dtype)) for name, tensor in self.raw_state().items()
        }
        return pack_tensors(tensors, {**(metadata or {}), FORMAT_KEY: "pt", FULL_RANK_MARK: "1"})

    def train(self, mode: bool = True) -> None:
        """See TrainableAdapter: there is no dropout."""

    def begin_step(self, step: int, micro_batch: int) -> None:
        """See TrainableAdapter: there is no dropout."""

    @torch.no_grad()
    def set_strength(self, strength: float) -> None:
        """See TrainableAdapter: weights between those of the base and the trained; copies all of them."""
        if strength == self._strength:
            return
        self._strength = strength
        if self._trained is None:
            self._trained = {name: _local(tensor).detach().cpu().clone() for name, tensor in self._parameters.items()}
        for name, tensor in self._parameters.items():
            base, trained = self._base[name], self._trained[name]
            if strength in (0.0, 1.0):
                _local(tensor).copy_(trained if strength else base)
            else:
                wide = torch.promote_types(base.dtype, torch.float32)
                _local(tensor).copy_(torch.lerp(base.to(wide), trained.to(wide), strength))
        if strength == 1.0:
            # Training goes on from here; the copy would be out of date.
            self._trained = None

    def detach(self) -> None:
        """See TrainableAdapter: the model has its base weights again, and is frozen."""
        self.set_strength(0.0)
        self._transformer.requires_grad_(False)


def attach_full_rank(transformer: nn.Module) -> FullRankAdapter:
    """Make every weight of a transformer trainable; sharded by FSDP2 where the process group has several ranks.

    Raises:
        AdapterConfigError: a weight is quantised.
    """
    quantised = [
        n for n, module in transformer.named_modules() if isinstance(module, nn.Linear) and not is_plain(module)
    ]
    if quantised:
        raise AdapterConfigError(
            f"full_rank trains every weight, but {len(quantised)} are quantised, the first is {quantised[0]}; set "
            "base_precision to no_change"
        )
    transformer.requires_grad_(True)
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        shard(transformer)
    adapter = FullRankAdapter(transformer, is_trained=True)
    logger.info("all %d weights are trained, %d numbers", len(adapter.named_parameters()), adapter.num_parameters)
    return adapter


def shard(transformer: nn.Module) -> None:
    """Shard the weights over the ranks of the default process group, block by block (FSDP2).

    Each block's weights are whole only while it runs; gradients are the mean over the ranks.
    """
    from torch.distributed.fsdp import fully_shard  # several ranks only

    model: Any = transformer
    blocks: list[Any] = [block.block for block in blocks_of(model)]
    for block in blocks:
        # The blocks' own forward is diffusers', which the training path does not use; see `block_runner`.
        block.forward = partial(_call_with, block)
    parts = (
        model.x_embedder,
        model.t_embedder,
        model.p_embedder,
        *model.caption_projection,
        model.final_layer.adaLN_modulation,
        model.final_layer.linear,
    )
    for part in (*blocks, *parts):
        # Each is a root of its own, as the transformer itself is never called; a root would keep its weights whole.
        fully_shard(part, reshard_after_forward=True)


def _call_with(module: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(module, *arguments)


@torch.no_grad()
def load_full_rank(transformer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> FullRankAdapter:
    """Put the weights of a whole transformer in place of a model's own; `detach` brings those back.

    Raises:
        ValueError: other names or shapes. The model is not changed.
    """
    adapter = FullRankAdapter(transformer, is_trained=False)
    check_state(dict(transformer.named_parameters()), tensors)
    for name, parameter in transformer.named_parameters():
        _write(parameter, tensors[name])
    return adapter


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    if isinstance(tensor, DTensor):
        from torch.distributed.tensor import distribute_tensor  # several ranks only

        whole = value.to(tensor.device, tensor.dtype)
        tensor.to_local().copy_(distribute_tensor(whole, tensor.device_mesh, tensor.placements).to_local())
    else:
        tensor.copy_(value)
