"""The Linears of a model that an adapter selects (spec 4.2), by the rules of `reverie_common.lycoris_presets`."""

from __future__ import annotations

from collections.abc import Iterator

from reverie_common.lycoris_presets import CLASS_ALIASES, Node, Selected, select_modules
from torch import nn

from reverie_hidream.adapters.config import AdapterMatchesNothingError, LokrOverrides, LokrPreset

LORA_PREFIX = "lycoris"


def select_linears(transformer: nn.Module, preset: LokrPreset) -> tuple[Selected[LokrOverrides], ...]:
    """The selected Linears with their overrides, in LyCORIS' order; the same for plain and quantised models.

    Raises:
        AdapterMatchesNothingError: the selection is empty.
    """
    selection = select_modules(_nodes(transformer), preset)
    if not selection.modules:
        raise AdapterMatchesNothingError(_nothing_matched(transformer, preset))
    return selection.modules


def select_by_ends(transformer: nn.Module, ends: tuple[str, ...]) -> list[str]:
    """Names of the Linears whose dotted name is one of `ends` or ends with a dot and one of them, as PEFT selects.

    Raises:
        AdapterMatchesNothingError: the selection is empty.
    """
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    selected = [name for name in names if any(name == end or name.endswith(f".{end}") for end in ends)]
    if not selected:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise AdapterMatchesNothingError(
            f"the adapter matches no Linear: target_modules {list(ends)}; the ends of this model's names are {known}"
        )
    return selected


def lora_name(module_name: str) -> str:
    """Name of a module in adapter files: `blocks.0.to_q` is `lycoris_blocks_0_to_q`."""
    return f"{LORA_PREFIX}_{module_name}".replace(".", "_")


def _nodes(transformer: nn.Module) -> Iterator[Node]:
    for name, module in transformer.named_modules():
        is_linear = isinstance(module, nn.Linear)
        # A quantised Linear has a class of its own; a preset means the model's.
        yield Node(name=name, class_name="Linear" if is_linear else type(module).__name__, is_linear=is_linear)


def _nothing_matched(transformer: nn.Module, preset: LokrPreset) -> str:
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
