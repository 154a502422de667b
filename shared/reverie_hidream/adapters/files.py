"""Adapter files onto a model for inference, or merged into its weights (spec 4.6 to 4.8).

Read are LoKr and the other algorithms of LyCORIS, LoRA under its own and under LyCORIS' names, and whole transformers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from reverie_common.errors import IntegrityError
from reverie_common.storage.tensors import read_metadata, unpack_tensors
from torch import nn

from reverie_hidream.adapters.adapter import CONFIG_KEY, BranchAdapter, LycorisFormat, TrainableAdapter
from reverie_hidream.adapters.branch import Branch, is_plain
from reverie_hidream.adapters.config import AdapterConfigError, LokrConfig, LoraConfig, LycorisConfig
from reverie_hidream.adapters.file_modules import (
    KNOWN_NAMES,
    UNSUPPORTED,
    AdapterFileError,
    ModuleTensors,
    linear_size,
    read_branch,
)
from reverie_hidream.adapters.full_rank import FULL_RANK_MARK, load_full_rank
from reverie_hidream.adapters.lora import METADATA_KEY, LoraFormat
from reverie_hidream.adapters.selection import lora_name
from reverie_hidream.host_blocks import weights_at_hand
from reverie_hidream.tensor_io import from_raw

__all__ = ["AdapterFileError", "load_adapter", "merge_adapter", "merged_state"]

logger = logging.getLogger(__name__)

_PREFIXES = ("transformer.", "diffusion_model.")
"""What dotted names of modules may begin with: diffusers' and SimpleTuner's, and ai-toolkit's."""
_PICKLES = (b"\x80", b"PK\x03\x04")
"""How files of `torch.save` begin, the old ones and the new."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    """A file's content."""

    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]

    @property
    def config(self) -> LokrConfig | LycorisConfig:
        """The file's LyCORIS configuration; the default where it has none, or another tool's that we cannot read."""
        try:
            text = self.metadata.get(CONFIG_KEY)
            return _read_config(json.loads(text)) if text else LokrConfig()
        except (AdapterConfigError, ValueError, AttributeError, TypeError) as error:
            logger.warning("the adapter's %s cannot be read and is ignored: %s", CONFIG_KEY, error)
            return LokrConfig()

    @property
    def lora_alpha(self) -> float | None:
        """Alpha that diffusers' metadata state."""
        try:
            settings = json.loads(self.metadata.get(METADATA_KEY, "{}"))
            alpha = settings.get("transformer.lora_alpha")
            return None if alpha is None else float(alpha)
        except (ValueError, AttributeError, TypeError) as error:
            raise AdapterFileError(f"the adapter's metadata {METADATA_KEY} cannot be read: {error}") from error


def load_adapter(transformer: nn.Module, body: bytes, *, strength: float = 1.0) -> TrainableAdapter:
    """Put the adapter of a file on a model, plain or quantised, frozen.

    Args:
        body: a file as `TrainableAdapter.export`, LyCORIS, diffusers or SimpleTuner write it. The file of a whole
            transformer replaces the weights in place, and needs plain ones.
        strength: 1.0 is as trained: a multiplier in the file's configuration counts on top of it.

    Raises:
        AdapterFileError: not an adapter file, or made for another model. The model is not changed.
    """
    file = _read(body)
    if FULL_RANK_MARK in file.metadata:
        return _load_full_rank(transformer, file, strength)
    branches = _read_branches(transformer, file)
    linears = {name: transformer.get_submodule(name) for name in branches}
    for name, branch in branches.items():
        branch.move(device=weights_at_hand(linears[name]))
    is_lora = any(".lora_A." in name for name in file.tensors)
    adapter = BranchAdapter(branches, linears, LoraFormat(LoraConfig()) if is_lora else LycorisFormat(file.config))
    adapter.set_strength(strength)
    return adapter


@torch.no_grad()
def merge_adapter(transformer: nn.Module, body: bytes, *, strength: float = 1.0) -> int:
    """Add the adapter of a file to the weights of a plain model, and return how many weights and biases changed.

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
    """What `merge_adapter` would write, by the names of the state dict; the model is not changed.

    Summed in float32 (float64 for a float64 model) and rounded once.

    Raises:
        AdapterFileError: see `load_adapter`; or a weight is quantised.
    """
    file = _read(body)
    if FULL_RANK_MARK in file.metadata:
        raise AdapterFileError("the file holds a whole transformer, not an adapter; load it in place of the model")
    state: dict[str, torch.Tensor] = {}
    for name, branch in _read_branches(transformer, file).items():
        linear: Any = transformer.get_submodule(name)
        if not is_plain(linear):
            raise AdapterFileError(f"{name} is quantised and cannot take a merged adapter; merge first, then quantise")
        branch.strength = strength
        weight = linear.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        branch.move(device=weight.device, dtype=wide)
        state[f"{name}.weight"] = (weight.to(wide) + branch.weight_change(weight.to(wide))).to(weight.dtype)
        bias_change = branch.bias_change()
        if bias_change is not None:
            state[f"{name}.bias"] = (linear.bias.to(wide) + bias_change).to(linear.bias.dtype)
    return state


def _load_full_rank(transformer: nn.Module, file: _File, strength: float) -> TrainableAdapter:
    quantised = [
        n for n, module in transformer.named_modules() if isinstance(module, nn.Linear) and not is_plain(module)
    ]
    if quantised:
        raise AdapterFileError(
            f"the file holds a whole transformer, and this model is quantised, for instance {quantised[0]}; load it "
            "into a model with plain weights"
        )
    try:
        adapter = load_full_rank(transformer, file.tensors)
    except ValueError as error:
        raise AdapterFileError(f"the file holds the transformer of another model: {error}") from error
    adapter.set_strength(strength)
    return adapter


def _read_branches(transformer: nn.Module, file: _File) -> dict[str, Branch]:
    """Branches by dotted module name, in the model's order."""
    grouped = _group(file.tensors)
    multiplier, lora_alpha = file.config.multiplier, file.lora_alpha
    branches: dict[str, Branch] = {}
    for name, module in transformer.named_modules():
        tensors = next((found for key in _spellings(name) if (found := grouped.pop(key, None)) is not None), None)
        if tensors is None:
            continue
        if not isinstance(module, nn.Linear):
            raise AdapterFileError(f"the adapter changes {name}, which is a {type(module).__name__} and not a Linear")
        branches[name] = read_branch(
            ModuleTensors(
                name=lora_name(name),
                tensors=tensors,
                size=linear_size(module),
                multiplier=multiplier,
                lora_alpha=lora_alpha,
            )
        )
    if grouped or not branches:
        unknown = sorted(grouped)[:3]
        raise AdapterFileError(f"the adapter is for another model: it changes {len(grouped)} unknown modules {unknown}")
    return branches


def _spellings(name: str) -> list[str]:
    """How files name a module (spec 4.6, 4.8)."""
    return [lora_name(name), *(f"{prefix}{name}" for prefix in _PREFIXES)]


def _read(body: bytes) -> _File:
    try:
        tensors = {name: from_raw(raw) for name, raw in unpack_tensors(body).items()}
        file = _File(tensors=tensors, metadata=read_metadata(body))
    except (IntegrityError, ValueError) as error:
        if body.startswith(_PICKLES):
            raise AdapterFileError(
                "the adapter is a pickle (a file of torch.save): reading one can run code, so none is read; save it as "
                "safetensors"
            ) from error
        raise AdapterFileError(f"the adapter is not a readable safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterFileError(f"the adapter's {name!r} holds numbers that are not finite")
    return file


def _group(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors by module and by their names after the module's."""
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, name = _split(key)
        grouped.setdefault(module, {})[name] = tensor
    return grouped


def _split(key: str) -> tuple[str, str]:
    for name in KNOWN_NAMES:
        if key.endswith(f".{name}"):
            return key.removesuffix(f".{name}"), name
    for name, what in UNSUPPORTED.items():
        if key.endswith(f".{name}"):
            raise AdapterFileError(f"the adapter holds {key!r}: {what}")
    raise AdapterFileError(f"the adapter holds {key!r}, which is no part of a LoKr, LoRA or other adapter of LyCORIS")


def _read_config(config: Any) -> LokrConfig | LycorisConfig:
    is_lokr = str(config.get("algo", "lokr")).lower() == "lokr"
    return LokrConfig.from_dict(config) if is_lokr else LycorisConfig.from_dict(config)
