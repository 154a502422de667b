"""Adapter files of spec 4.6: onto a model for inference, or merged into its weights (spec 4.7)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

import torch
from reverie_common.errors import IntegrityError
from reverie_common.storage.tensors import read_metadata, unpack_tensors
from torch import nn

from reverie_hidream.adapters.adapter import LycorisFormat
from reverie_hidream.adapters.config import AdapterConfigError, LokrConfig
from reverie_hidream.adapters.kronecker import FACTOR_NAMES, LokrBranch
from reverie_hidream.adapters.lokr import CONFIG_KEY, LokrAdapter
from reverie_hidream.adapters.selection import lora_name
from reverie_hidream.tensor_io import from_raw

logger = logging.getLogger(__name__)


class AdapterFileError(ValueError):
    """An adapter file that cannot be used on this model; the message says why."""


def load_adapter(transformer: nn.Module, body: bytes, *, strength: float = 1.0) -> LokrAdapter:
    """Hook the adapter of a file into a model, plain or quantised, frozen.

    Args:
        body: a LoKr file as `LokrAdapter.export`, LyCORIS or SimpleTuner write it.
        strength: 1.0 is as trained: a multiplier in the file's configuration counts on top of it.

    Raises:
        AdapterFileError: not a LoKr file, or made for another model. The model is not changed.
    """
    branches = _read_branches(transformer, body)
    linears = {name: transformer.get_submodule(name) for name in branches}
    for name, branch in branches.items():
        device = next(linears[name].parameters()).device
        branch.factors = {key: tensor.to(device) for key, tensor in branch.factors.items()}
    adapter = LokrAdapter(branches, linears, LycorisFormat(_config_of(body)))
    adapter.set_strength(strength)
    return adapter


@torch.no_grad()
def merge_adapter(transformer: nn.Module, body: bytes, *, strength: float = 1.0) -> int:
    """Add the adapter of a file to the weights of a plain model, and return how many weights changed.

    Merge first and quantise then: an int8 weight cannot take a change that is finer than its steps.

    Raises:
        AdapterFileError: see `load_adapter`; or a weight is quantised. The model is not changed.
    """
    state = merged_state(transformer, body, strength=strength)
    for name, weight in state.items():
        transformer.get_parameter(name).copy_(weight)
    return len(state)


@torch.no_grad()
def merged_state(transformer: nn.Module, body: bytes, *, strength: float = 1.0) -> dict[str, torch.Tensor]:
    """The weights that `merge_adapter` would write, by their names in the state dict; the model is not changed.

    Summed in float32 (float64 for a float64 model) and rounded once.

    Raises:
        AdapterFileError: see `load_adapter`; or a weight is quantised.
    """
    state: dict[str, torch.Tensor] = {}
    for name, branch in _read_branches(transformer, body).items():
        weight = transformer.get_submodule(name).weight
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise AdapterFileError(f"{name} is quantised and cannot take a merged adapter; merge first, then quantise")
        branch.strength = strength
        wide = torch.promote_types(weight.dtype, torch.float32)
        branch.factors = {key: tensor.to(weight.device, wide) for key, tensor in branch.factors.items()}
        state[f"{name}.weight"] = (weight.to(wide) + branch.weight_change(weight)).to(weight.dtype)
    return state


def _read_branches(transformer: nn.Module, body: bytes) -> dict[str, LokrBranch]:
    """Branches by dotted module name, in the model's order."""
    grouped = _group(_read_tensors(body))
    multiplier = _config_of(body).multiplier
    branches: dict[str, LokrBranch] = {}
    for name, module in transformer.named_modules():
        # Some writers keep the dotted path (spec 4.6).
        tensors = grouped.pop(lora_name(name), None) or grouped.pop(f"transformer.{name}", None)
        if tensors is None:
            continue
        if not isinstance(module, nn.Linear):
            raise AdapterFileError(f"the adapter changes {name}, which is a {type(module).__name__} and not a Linear")
        branches[name] = _branch(lora_name(name), tensors, multiplier)
        _check_size(branches[name], module, name)
    if grouped or not branches:
        unknown = sorted(grouped)[:3]
        raise AdapterFileError(f"the adapter is for another model: it changes {len(grouped)} unknown modules {unknown}")
    return branches


def _read_tensors(body: bytes) -> dict[str, torch.Tensor]:
    try:
        return {name: from_raw(raw) for name, raw in unpack_tensors(body).items()}
    except (IntegrityError, ValueError) as error:
        raise AdapterFileError(f"the adapter is not a readable safetensors file: {error}") from error


def _group(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, name = key.rpartition(".")
        if name not in (*FACTOR_NAMES, "alpha"):
            raise AdapterFileError(f"the adapter holds {key!r}, which is no part of a LoKr; only LoKr files are read")
        if not torch.isfinite(tensor).all():
            raise AdapterFileError(f"the adapter's {key!r} holds numbers that are not finite")
        grouped.setdefault(module, {})[name] = tensor
    return grouped


def _branch(name: str, tensors: Mapping[str, torch.Tensor], multiplier: float) -> LokrBranch:
    factors = {key: tensor for key, tensor in tensors.items() if key != "alpha"}
    for part in ("lokr_w1", "lokr_w2"):
        halves = {f"{part}_a", f"{part}_b"} & factors.keys()
        if (part in factors) == bool(halves) or len(halves) == 1:
            raise AdapterFileError(f"{name} needs either {part} or {part}_a and {part}_b; it has {sorted(factors)}")
    if any(tensor.ndim != 2 for tensor in factors.values()):
        shapes = {key: tuple(tensor.shape) for key, tensor in factors.items()}
        raise AdapterFileError(f"{name}: the factors must be matrices; got {shapes}")
    if "alpha" in tensors and tensors["alpha"].numel() != 1:
        raise AdapterFileError(f"{name}: alpha must be one number; got shape {tuple(tensors['alpha'].shape)}")
    alpha = float(tensors["alpha"]) if "alpha" in tensors else 0.0
    return LokrBranch(name, factors, alpha=alpha, multiplier=multiplier)


def _check_size(branch: LokrBranch, linear: nn.Linear, name: str) -> None:
    if (branch.out_features, branch.in_features) != (linear.out_features, linear.in_features):
        raise AdapterFileError(
            f"the adapter is for another model: it changes a {branch.out_features}x{branch.in_features} weight at "
            f"{name}, which has {linear.out_features}x{linear.in_features}"
        )


def _config_of(body: bytes) -> LokrConfig:
    """The file's configuration; the default where it has none or one of another tool that we cannot read."""
    try:
        text = read_metadata(body).get(CONFIG_KEY)
        return LokrConfig.from_dict(json.loads(text)) if text else LokrConfig()
    except (AdapterConfigError, IntegrityError, ValueError, AttributeError, TypeError) as error:
        logger.warning("the adapter's %s cannot be read and is ignored: %s", CONFIG_KEY, error)
        return LokrConfig()
