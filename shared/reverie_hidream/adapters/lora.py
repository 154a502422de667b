"""LoRA: starts of PEFT, branches beside the frozen Linears, and files for diffusers and ComfyUI (spec 4.8)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from reverie_hidream.adapters.adapter import BranchAdapter
from reverie_hidream.adapters.branch import Branch, dense_weight, is_plain
from reverie_hidream.adapters.config import AdapterConfigError, LoraConfig
from reverie_hidream.adapters.dora import DoraBranch, row_lengths
from reverie_hidream.adapters.dropout import AdapterClock, BranchDropout
from reverie_hidream.adapters.low_rank import DOWN, UP, LowRankBranch
from reverie_hidream.adapters.selection import lora_name, select_by_ends
from reverie_hidream.host_blocks import weights_at_hand

logger = logging.getLogger(__name__)

METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps the settings of a LoRA file."""

FILE_PREFIX = "transformer."
MAGNITUDE = "lora_magnitude_vector"
COMFY_MAGNITUDE = "dora_scale"

_PEFT_INITS: Mapping[str, bool | str] = {"default": True, "gaussian": "gaussian", "olora": "olora", "pissa": "pissa"}
_FROM_WEIGHT = ("olora", "pissa")


def attach_lora(
    transformer: nn.Module, config: LoraConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> BranchAdapter:
    """Hook a new LoRA into a frozen model, plain or quantised; it changes nothing until it is trained.

    Args:
        dtype: of the trainable tensors; they are cast to the activations' dtype where they are applied.
        seed: start and dropouts are functions of it; torch's global generator is not touched.

    Raises:
        AdapterMatchesNothingError: the configuration selects no Linear.
        AdapterConfigError: `use_dora` on a quantised model, or a rank above what a start from the weight can have.
    """
    names = select_by_ends(transformer, config.target_modules)
    linears = {name: transformer.get_submodule(name) for name in names}
    _check(config, linears)
    clock = AdapterClock(seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        branches = {name: _branch(name, linear, config, dtype) for name, linear in linears.items()}
    for index, branch in enumerate(branches.values()):
        if config.dropout:
            branch.dropout = BranchDropout(clock=clock, index=index, element=config.dropout)
    adapter = BranchAdapter(branches, linears, LoraFormat(config), clock=clock)
    logger.info("LoRA on %d Linears with %d parameters", adapter.num_modules, adapter.num_parameters)
    return adapter


class LoraFormat:
    """PEFT's names under `transformer.`: `<dotted path>.lora_A.weight` (r, in) and `.lora_B.weight` (out, r)."""

    def __init__(self, config: LoraConfig) -> None:
        """Write files in the format that the configuration names."""
        self._config = config

    def tensors(self, branches: Mapping[str, Branch]) -> dict[str, torch.Tensor]:
        """See FileFormat."""
        tensors: dict[str, torch.Tensor] = {}
        for name, branch in branches.items():
            low_rank = _low_rank(branch)
            up, down = _whole_factors(low_rank)
            key = f"{FILE_PREFIX}{name}"
            tensors[f"{key}.lora_A.weight"] = down
            tensors[f"{key}.lora_B.weight"] = up
            if self._config.format == "comfyui":
                tensors[f"{key}.alpha"] = torch.tensor(_alpha(low_rank), dtype=torch.float32)
            if isinstance(branch, DoraBranch):
                tensors.update(self._magnitude(key, branch))
        return tensors

    def metadata(self, branches: Mapping[str, Branch], /) -> dict[str, str]:
        """See FileFormat: what diffusers builds PEFT's configuration from, alpha included."""
        first = _low_rank(next(iter(branches.values())))
        settings = {
            "r": _whole_factors(first)[1].shape[0],
            "lora_alpha": _alpha(first),
            "lora_dropout": self._config.dropout,
            "target_modules": list(branches),
            "use_dora": self._config.use_dora,
        }
        entries = {f"{FILE_PREFIX}{name}": value for name, value in settings.items()}
        return {METADATA_KEY: json.dumps(entries, sort_keys=True)}

    def _magnitude(self, key: str, branch: DoraBranch) -> dict[str, torch.Tensor]:
        magnitude = branch.magnitude.detach().flatten()
        if self._config.format == "comfyui":
            return {f"{key}.{COMFY_MAGNITUDE}": magnitude[:, None]}
        return {f"{key}.{MAGNITUDE}": magnitude}


def count_lora(sizes: Iterable[tuple[int, int]], config: LoraConfig) -> int:
    """Trainable numbers of a LoRA over Linears of these (out_features, in_features)."""
    return sum(config.rank * (rows + columns) + (rows if config.use_dora else 0) for rows, columns in sizes)


def _check(config: LoraConfig, linears: Mapping[str, nn.Module]) -> None:
    quantised = [name for name, linear in linears.items() if not is_plain(linear)]
    if config.use_dora and quantised:
        raise AdapterConfigError(
            f"use_dora needs the exact weights, but {len(quantised)} of the selected are quantised, the first is "
            f"{quantised[0]}; set base_precision to no_change, or leave use_dora out"
        )
    if config.init_type in _FROM_WEIGHT:
        for name, linear in linears.items():
            limit = min(_size(linear))
            if config.rank > limit:
                raise AdapterConfigError(
                    f"init_type {config.init_type} takes the rank from the weight: {name} has at most {limit}, rank is "
                    f"{config.rank}; lower the rank, or use init_type default"
                )


def _branch(name: str, linear: nn.Module, config: LoraConfig, dtype: torch.dtype) -> Branch:
    up, down = _start(linear, config)
    device = weights_at_hand(linear)
    low_rank = LowRankBranch(
        lora_name(name),
        {UP: _parameter(up, device, dtype), DOWN: _parameter(down, device, dtype)},
        start=(up.to(device, dtype), down.to(device, dtype)) if config.init_type in _FROM_WEIGHT else None,
        drops_inputs=True,
        size=_size(linear),
        alpha=config.alpha or config.rank,
    )
    if not config.use_dora:
        return low_rank
    lengths = row_lengths(dense_weight(linear, linear.forward))
    magnitude = _parameter(lengths, device, torch.promote_types(dtype, torch.float32))
    return DoraBranch(low_rank, magnitude, is_length_fixed=True, key=MAGNITUDE)


def _start(linear: nn.Module, config: LoraConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Up (out, r) and down (r, in) as PEFT starts them, float32."""
    rows, columns = _size(linear)
    if next(linear.parameters()).is_meta:
        return torch.empty(rows, config.rank, device="meta"), torch.empty(config.rank, columns, device="meta")
    # PEFT comes with the trainer only; a machine that draws or measures does not need it.
    import peft

    holder = nn.ModuleDict({"linear": nn.Linear(columns, rows, bias=False, device="meta")})
    holder["linear"].weight = nn.Parameter(_stand_in(linear, config), requires_grad=False)
    settings: Any = {
        "r": config.rank,
        "lora_alpha": config.alpha or config.rank,
        "target_modules": ["linear"],
        "init_lora_weights": _PEFT_INITS[config.init_type],
    }
    peft.inject_adapter_in_model(peft.LoraConfig(**settings), holder)
    layer: Any = holder["linear"]
    return layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()


def _stand_in(linear: nn.Module, config: LoraConfig) -> torch.Tensor:
    """A weight for PEFT to start from, on the CPU: a copy where it matters, one number in memory where it does not."""
    if config.init_type in _FROM_WEIGHT:
        return dense_weight(linear, linear.forward).to("cpu", torch.float32, copy=True)
    return torch.zeros(1).expand(_size(linear))


def _whole_factors(branch: LowRankBranch) -> tuple[torch.Tensor, torch.Tensor]:
    """Up and down whose product is the whole change; a start that is taken off again doubles their rank."""
    up, down = branch.factors[UP].detach(), branch.factors[DOWN].detach()
    if branch.start is None:
        return up, down
    return torch.cat([up, -branch.start[0]], dim=1), torch.cat([down, branch.start[1]])


def _alpha(branch: LowRankBranch) -> float:
    """Alpha that gives the file's factors the branch's scale."""
    return branch.scale * _whole_factors(branch)[1].shape[0]


def _low_rank(branch: Branch) -> LowRankBranch:
    inner = branch.inner if isinstance(branch, DoraBranch) else branch
    if not isinstance(inner, LowRankBranch):
        raise TypeError(f"{branch.name} is no LoRA")
    return inner


def _parameter(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(device=device, dtype=dtype, copy=True))


def _size(linear: nn.Module) -> tuple[int, int]:
    layer: Any = linear
    return int(layer.out_features), int(layer.in_features)
