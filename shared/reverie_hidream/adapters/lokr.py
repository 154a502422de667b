"""LoKr and the other algorithms of LyCORIS on a transformer: attaching and counting (spec 4.2 to 4.4)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from reverie_hidream.adapters.adapter import CONFIG_KEY, AdapterSize, BranchAdapter, LycorisFormat
from reverie_hidream.adapters.algorithms import check_algorithms, create_branch
from reverie_hidream.adapters.branch import Branch
from reverie_hidream.adapters.config import LokrConfig, LycorisConfig, ModuleSettings
from reverie_hidream.adapters.dora import DoraBranch
from reverie_hidream.adapters.dropout import AdapterClock, BranchDropout
from reverie_hidream.adapters.factored import FactoredBranch
from reverie_hidream.adapters.kronecker import LokrBranch
from reverie_hidream.adapters.lokr_start import start_near_weights
from reverie_hidream.adapters.selection import lora_name, select_linears
from reverie_hidream.host_blocks import weights_at_hand
from reverie_hidream.transformer import REAL_CONFIG, build_meta_transformer

__all__ = [
    "CONFIG_KEY",
    "AdapterSize",
    "LokrAdapter",
    "attach_lokr",
    "attach_lycoris",
    "count_modules",
    "count_selected",
]

logger = logging.getLogger(__name__)

LokrAdapter = BranchAdapter


def attach_lycoris(
    transformer: nn.Module, config: LokrConfig | LycorisConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> BranchAdapter:
    """Hook a new adapter into a frozen model, plain or quantised; it changes nothing until it is trained.

    `init_lokr_norm` without a scalar is the exception: its start is a small change.

    Args:
        dtype: of the trainable tensors; they are cast to the activations' dtype where they are applied.
        seed: the start of the factors and the dropouts are functions of it; torch's global generator is not touched.

    Raises:
        AdapterMatchesNothingError: the configuration selects no Linear.
        AdapterConfigError: an algorithm or a setting of it does not work here.
    """
    branches = create_branches(transformer, config, seed=seed)
    linears = {name: transformer.get_submodule(name) for name in branches}
    for name, branch in branches.items():
        _make_trainable(branch, device=weights_at_hand(linears[name]), dtype=dtype)
    if isinstance(config, LokrConfig) and config.init_lokr_norm is not None:
        start_near_weights(branches, linears, size=config.init_lokr_norm, seed=seed)
    clock = AdapterClock(seed=seed)
    settings = _settings(transformer, config)
    for index, (name, branch) in enumerate(branches.items()):
        branch.dropout = _dropout(settings[name], clock, index)
    adapter = BranchAdapter(branches, linears, LycorisFormat(config), clock=clock)
    logger.info("adapter on %d Linears with %d parameters", adapter.num_modules, adapter.num_parameters)
    return adapter


attach_lokr = attach_lycoris


def create_branches(transformer: nn.Module, config: LokrConfig | LycorisConfig, *, seed: int) -> dict[str, Branch]:
    """The branches of the selected Linears by dotted name, not yet in use; their start is a function of `seed`.

    Works on plain and quantised models, and on the meta device.

    Raises:
        AdapterMatchesNothingError: the selection is empty.
        AdapterConfigError: an algorithm or a setting of it does not work here.
    """
    check_algorithms(config)
    settings = _settings(transformer, config)
    on_meta = next(transformer.parameters()).device.type == "meta"
    with torch.random.fork_rng(devices=[]), torch.device("meta" if on_meta else "cpu"):
        torch.manual_seed(seed)
        return {
            name: create_branch(lora_name(name), transformer.get_submodule(name), own) for name, own in settings.items()
        }


def count_selected(
    config: LokrConfig | LycorisConfig, transformer_config: Mapping[str, Any] = REAL_CONFIG
) -> AdapterSize:
    """What a configuration would adapt in a model, counted without memory for its weights.

    Raises:
        AdapterMatchesNothingError: the configuration selects no Linear.
    """
    return count_modules(build_meta_transformer(transformer_config), config)


def count_modules(transformer: nn.Module, config: LokrConfig | LycorisConfig) -> AdapterSize:
    """What a configuration would adapt in this model, which is not changed.

    Raises:
        AdapterMatchesNothingError: the configuration selects no Linear.
    """
    branches = create_branches(transformer, config, seed=0)
    return AdapterSize(len(branches), sum(t.numel() for branch in branches.values() for _, t in branch.named_tensors()))


def _settings(transformer: nn.Module, config: LokrConfig | LycorisConfig) -> dict[str, ModuleSettings]:
    return {item.name: config.settings(item.overrides) for item in select_linears(transformer, config.apply_preset)}


def _make_trainable(branch: Branch, *, device: torch.device, dtype: torch.dtype) -> None:
    def parameter(tensor: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.detach().to(device=device, dtype=dtype))

    if isinstance(branch, DoraBranch):
        _make_trainable(branch.inner, device=device, dtype=dtype)
        branch.magnitude = parameter(branch.magnitude)
    if isinstance(branch, LokrBranch | FactoredBranch):
        branch.factors = {name: parameter(tensor) for name, tensor in branch.factors.items()}
        branch.scalar = None if branch.scalar is None else parameter(branch.scalar)


def _dropout(settings: ModuleSettings, clock: AdapterClock, index: int) -> BranchDropout | None:
    # DyLoRA draws the ranks of each micro-batch from here too.
    if settings.algo != "dylora" and not (settings.dropout or settings.rank_dropout or settings.module_dropout):
        return None
    return BranchDropout(
        clock=clock,
        index=index,
        element=settings.dropout,
        rank=settings.rank_dropout,
        module=settings.module_dropout,
    )
