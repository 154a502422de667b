"""Adapters for the frozen transformer: trained, exported, loaded and merged (spec 4)."""

from reverie_hidream.adapters.adapter import AdapterSize, BranchAdapter, TrainableAdapter
from reverie_hidream.adapters.attach import attach_adapter
from reverie_hidream.adapters.config import (
    AdapterConfigError,
    AdapterMatchesNothingError,
    FullRankConfig,
    LokrConfig,
    LokrOverrides,
    LokrPreset,
    LoraConfig,
    LycorisConfig,
)
from reverie_hidream.adapters.files import AdapterFileError, load_adapter, merge_adapter, merged_state
from reverie_hidream.adapters.lokr import LokrAdapter, attach_lokr, count_selected

__all__ = [
    "AdapterConfigError",
    "AdapterFileError",
    "AdapterMatchesNothingError",
    "AdapterSize",
    "BranchAdapter",
    "FullRankConfig",
    "LokrAdapter",
    "LokrConfig",
    "LokrOverrides",
    "LokrPreset",
    "LoraConfig",
    "LycorisConfig",
    "TrainableAdapter",
    "attach_adapter",
    "attach_lokr",
    "count_selected",
    "load_adapter",
    "merge_adapter",
    "merged_state",
]
