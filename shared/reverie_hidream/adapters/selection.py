"""Choosing, shaping and initialising LoKr factors with LyCORIS (spec 4.2 to 4.4).

LyCORIS keeps its preset in class attributes, for the whole process; every use here sets all of them and puts the
library's own values back.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch
from lycoris.wrapper import LycorisNetwork
from torch import nn

from reverie_hidream.adapters.config import CLASS_ALIASES, AdapterMatchesNothingError, LokrConfig

logger = logging.getLogger(__name__)

LORA_PREFIX = "lycoris"
_PRESET_ATTRIBUTES = (
    "ENABLE_CONV",
    "TARGET_REPLACE_MODULE",
    "TARGET_REPLACE_NAME",
    "LORA_PREFIX",
    "MODULE_ALGO_MAP",
    "NAME_ALGO_MAP",
    "USE_FNMATCH",
    "TARGET_EXCLUDE_NAME",
)
_preset_lock = threading.Lock()


def create_modules(transformer: nn.Module, config: LokrConfig, *, seed: int) -> list[Any]:
    """LyCORIS' modules for the selected Linears, initialised as a function of `seed`, not yet in use.

    Works on plain and quantised models, and on the meta device.

    Raises:
        AdapterMatchesNothingError: the selection is empty.
    """
    on_meta = next(transformer.parameters()).device.type == "meta"
    with (
        _preset(config),
        _quiet_lycoris(),
        torch.random.fork_rng(devices=[]),
        torch.device("meta" if on_meta else "cpu"),
    ):
        torch.manual_seed(seed)
        network = LycorisNetwork(
            transformer,
            multiplier=config.multiplier,
            lora_dim=config.linear_dim,
            conv_lora_dim=0,
            alpha=config.linear_alpha,
            network_module="lokr",
            factor=config.factor,
            full_matrix=config.full_matrix,
            use_scalar=config.use_scalar,
            decompose_both=config.decompose_both,
            # Never build the dense change: in a bfloat16 base it would be rounded away (and costs 3 Linears).
            bypass_mode=True,
            warn_on_unmatched=False,
        )
    if not network.loras:
        raise AdapterMatchesNothingError(_nothing_matched(transformer, config))
    return list(network.loras)


def lora_name(module_name: str) -> str:
    """Name of a module in adapter files: `blocks.0.to_q` is `lycoris_blocks_0_to_q`."""
    return f"{LORA_PREFIX}_{module_name}".replace(".", "_")


@contextlib.contextmanager
def _preset(config: LokrConfig) -> Iterator[None]:
    preset = config.apply_preset
    with _preset_lock:
        saved = {name: getattr(LycorisNetwork, name) for name in _PRESET_ATTRIBUTES}
        try:
            LycorisNetwork.apply_preset(
                {
                    "enable_conv": False,
                    "target_module": [_aliased(name) for name in preset.class_selection()],
                    "target_name": list(preset.target_name),
                    "module_algo_map": {_aliased(key): item.to_dict() for key, item in preset.module_algo_map.items()},
                    "name_algo_map": {key: item.to_dict() for key, item in preset.name_algo_map.items()},
                    "lora_prefix": LORA_PREFIX,
                    "use_fnmatch": preset.use_fnmatch,
                    "exclude_name": list(preset.exclude_name),
                }
            )
            yield
        finally:
            for name, value in saved.items():
                setattr(LycorisNetwork, name, value)


@contextlib.contextmanager
def _quiet_lycoris() -> Iterator[None]:
    # It reports a dozen lines at every creation; what matters of them we say ourselves.
    lycoris_logger = logging.getLogger("LyCORIS")
    level = lycoris_logger.level
    lycoris_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        lycoris_logger.setLevel(level)


def _aliased(class_name: str) -> str:
    return CLASS_ALIASES.get(class_name, class_name)


def _nothing_matched(transformer: nn.Module, config: LokrConfig) -> str:
    preset = config.apply_preset
    classes = sorted({type(module).__name__ for module in transformer.modules() if _has_linear(module)})
    aliases = ", ".join(f"{alias} for {name}" for alias, name in CLASS_ALIASES.items() if name in classes)
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    example = max(linears, key=lambda name: name.count("."), default="")
    kind = "fnmatch patterns" if preset.use_fnmatch else "regular expressions"
    return (
        f"the adapter matches no Linear: target_module {list(preset.class_selection())}, "
        f"module_algo_map {list(preset.module_algo_map)}, name_algo_map {list(preset.name_algo_map)}, "
        f"target_name {list(preset.target_name)} ({kind}), exclude_name {list(preset.exclude_name)}. "
        f"Classes of this model: {', '.join(classes)} ({aliases}). Names look like {example}"
    )


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())
