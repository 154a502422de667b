"""A LoKr on a transformer: attaching, training state, export (spec 4.4 to 4.7)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from reverie_common.storage.tensors import pack_tensors
from torch import nn

from reverie_hidream.adapters.branch import FACTOR_NAMES, LokrBranch, hook, unhook
from reverie_hidream.adapters.config import LokrConfig
from reverie_hidream.adapters.selection import create_modules, lora_name
from reverie_hidream.tensor_io import to_raw
from reverie_hidream.transformer import REAL_CONFIG, build_meta_transformer

logger = logging.getLogger(__name__)

CONFIG_KEY = "lycoris_config"
"""Metadata key of an adapter file that holds the configuration as JSON (spec 4.6)."""


class AdapterSize(NamedTuple):
    """What a configuration adapts."""

    num_modules: int
    num_parameters: int


class LokrAdapter:
    """LoKr branches hooked into the Linears of a frozen model.

    The model's own parameters and state dict are untouched; `detach` restores its forward exactly.
    """

    def __init__(
        self, config: LokrConfig, branches: Mapping[str, LokrBranch], linears: Mapping[str, nn.Module]
    ) -> None:
        """Hook the branches in.

        Args:
            config: what is written into exported files.
            branches: by dotted module name.
            linears: the same names' modules.
        """
        self.config = config
        self._branches = dict(branches)
        self._linears = dict(linears)
        for name, branch in self._branches.items():
            hook(self._linears[name], branch)

    @property
    def selected(self) -> list[str]:
        """Dotted names of the adapted Linears, in the model's order."""
        return list(self._branches)

    @property
    def num_modules(self) -> int:
        """Number of adapted Linears."""
        return len(self._branches)

    @property
    def num_parameters(self) -> int:
        """Number of trainable numbers, scalars included."""
        return sum(tensor.numel() for tensor in self._tensors().values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable tensors by `<lora name>.<factor>`, in a fixed order; empty for a loaded, frozen adapter."""
        return {name: tensor for name, tensor in self._tensors().items() if isinstance(tensor, nn.Parameter)}

    def parameters(self) -> list[nn.Parameter]:
        """Trainable tensors, in a fixed order."""
        return list(self.named_parameters().values())

    def raw_state(self) -> dict[str, torch.Tensor]:
        """Copies of all tensors on the CPU, scalars apart: what an exact resume needs (spec 4.7)."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._tensors().items()}

    @torch.no_grad()
    def load_raw_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up what `raw_state` gave.

        Raises:
            ValueError: other names or shapes: the state is of another configuration. Nothing is changed.
        """
        tensors = self._tensors()
        if missing := sorted(tensors.keys() - state.keys()) + sorted(state.keys() - tensors.keys()):
            raise ValueError(
                f"the saved state is of another adapter: {len(missing)} names differ, the first is {missing[0]}"
            )
        for name, tensor in tensors.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f"saved {name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
        for name, tensor in tensors.items():
            tensor.copy_(state[name])

    def export(self, metadata: Mapping[str, str] | None = None, *, dtype: torch.dtype = torch.bfloat16) -> bytes:
        """The adapter as a file that LyCORIS, ComfyUI and `load_adapter` read (spec 4.6).

        The same state and metadata give the same bytes.

        Args:
            metadata: more entries for the file's metadata; `lycoris_config` is written by itself.
            dtype: of the factors; alpha stays float32.
        """
        tensors: dict[str, torch.Tensor] = {}
        for branch in self._branches.values():
            tensors[f"{branch.name}.alpha"] = torch.tensor(branch.alpha, dtype=torch.float32)
            for name, tensor in branch.exported().items():
                tensors[f"{branch.name}.{name}"] = tensor.to(dtype)
        entries = {**(metadata or {}), CONFIG_KEY: self.config.to_json()}
        return pack_tensors({name: to_raw(tensor) for name, tensor in tensors.items()}, entries)

    def set_strength(self, strength: float) -> None:
        """Scale the adapter's effect: 1.0 as trained, 0.0 the base model, to the last bit."""
        for branch in self._branches.values():
            branch.strength = strength

    def detach(self) -> None:
        """Take the adapter off the model. Its tensors stay; may be repeated."""
        for name, branch in self._branches.items():
            unhook(self._linears[name], branch)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{branch.name}.{name}": tensor
            for branch in self._branches.values()
            for name, tensor in branch.named_tensors()
        }


def attach_lokr(
    transformer: nn.Module, config: LokrConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> LokrAdapter:
    """Hook a new LoKr into a frozen model, plain or quantised; it changes nothing until it is trained.

    Args:
        dtype: of the trainable tensors; they are cast to the activations' dtype where they are applied.
        seed: the start of the factors is a function of it; torch's global generator is not touched.

    Raises:
        AdapterMatchesNothingError: the configuration selects no Linear.
    """
    names = {lora_name(name): name for name, _ in transformer.named_modules()}
    linears, branches = {}, {}
    for module in create_modules(transformer, config, seed=seed):
        name = names[module.lora_name]
        linears[name] = module.org_module[0]
        branches[name] = _branch_of(module, config, device=linears[name].weight.device, dtype=dtype)
    adapter = LokrAdapter(config, branches, linears)
    logger.info("LoKr on %d Linears with %d parameters", adapter.num_modules, adapter.num_parameters)
    return adapter


def count_selected(config: LokrConfig, transformer_config: Mapping[str, Any] = REAL_CONFIG) -> AdapterSize:
    """What a configuration would adapt in a model, counted without memory for its weights.

    Raises:
        AdapterMatchesNothingError: the configuration selects no Linear.
    """
    return count_modules(build_meta_transformer(transformer_config), config)


def count_modules(transformer: nn.Module, config: LokrConfig) -> AdapterSize:
    """What a configuration would adapt in this model, which is not changed.

    Raises:
        AdapterMatchesNothingError: the configuration selects no Linear.
    """
    modules = create_modules(transformer, config, seed=0)
    return AdapterSize(len(modules), sum(tensor.numel() for module in modules for tensor in module.parameters()))


def _branch_of(module: Any, config: LokrConfig, *, device: torch.device, dtype: torch.dtype) -> LokrBranch:
    def trainable(tensor: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.detach().to(device=device, dtype=dtype))

    factors = {name: trainable(getattr(module, name)) for name in FACTOR_NAMES if hasattr(module, name)}
    scalar = trainable(module.scalar) if isinstance(module.scalar, nn.Parameter) else None
    return LokrBranch(module.lora_name, factors, alpha=float(module.alpha), scalar=scalar, multiplier=config.multiplier)
