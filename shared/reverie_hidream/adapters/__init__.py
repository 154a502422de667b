"""Adapters for the frozen transformer: LoKr, trained, exported, loaded and merged (spec 4)."""

from reverie_hidream.adapters.config import (
    AdapterConfigError,
    AdapterMatchesNothingError,
    LokrConfig,
    LokrOverrides,
    LokrPreset,
)
from reverie_hidream.adapters.files import AdapterFileError, load_adapter, merge_adapter, merged_state
from reverie_hidream.adapters.lokr import AdapterSize, LokrAdapter, attach_lokr, count_selected

__all__ = [
    "AdapterConfigError",
    "AdapterFileError",
    "AdapterMatchesNothingError",
    "AdapterSize",
    "LokrAdapter",
    "LokrConfig",
    "LokrOverrides",
    "LokrPreset",
    "attach_lokr",
    "count_selected",
    "load_adapter",
    "merge_adapter",
    "merged_state",
]
