"""What a job trains: LoKr, another algorithm of LyCORIS, LoRA, or every weight."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True, kw_only=True, slots=True)
class LokrOverrides:
    """What a selection changes about the adapter; None leaves a field as it is."""

    factor: int | None = None
    linear_dim: int | None = None
    linear_alpha: float | None = None
    full_matrix: bool | None = None
    use_scalar: bool | None = None
    decompose_both: bool | None = None
    dropout: float | None = None
    rank_dropout: float | None = None
    module_dropout: float | None = None
    algo: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LokrPreset:
    """Which modules are adapted, with the names of the job file (aliases are not resolved here)."""

    target_module: tuple[str, ...] = ()
    module_algo_map: Mapping[str, LokrOverrides] = field(default_factory=dict)
    name_algo_map: Mapping[str, LokrOverrides] = field(default_factory=dict)
    use_fnmatch: bool = True
    target_name: tuple[str, ...] = ()
    exclude_name: tuple[str, ...] = ()
    enable_conv: bool = False


def _attention() -> LokrPreset:
    return LokrPreset(target_module=("Attention",))


@dataclass(frozen=True, kw_only=True, slots=True)
class LokrAdapter:
    """LyCORIS LoKr."""

    factor: int = 16
    linear_dim: int = 16384
    linear_alpha: float = 1.0
    multiplier: float = 1.0
    full_matrix: bool = True
    use_scalar: bool = False
    decompose_both: bool = False
    apply_preset: LokrPreset = field(default_factory=_attention)
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    dora_wd: bool = False
    init_lokr_norm: float | None = None
    bypass_mode: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LycorisAdapter:
    """Another algorithm of LyCORIS."""

    algo: str = ""
    linear_dim: int = 16
    linear_alpha: float = 1.0
    multiplier: float = 1.0
    use_scalar: bool = False
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    dora_wd: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    apply_preset: LokrPreset = field(default_factory=_attention)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraAdapter:
    """LoRA, by PEFT."""

    rank: int = 16
    alpha: float | None = None
    """None where the job does not say: the rank."""
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out")
    init_type: str = "default"
    use_dora: bool = False
    format: str = "diffusers"


@dataclass(frozen=True, kw_only=True, slots=True)
class FullRank:
    """Every weight of the transformer."""


Adapter: TypeAlias = LokrAdapter | LycorisAdapter | LoraAdapter | FullRank

KINDS: Mapping[str, type[Adapter]] = {
    "lokr": LokrAdapter,
    "lycoris": LycorisAdapter,
    "lora": LoraAdapter,
    "full_rank": FullRank,
}
"""Names in `AdapterSpec.kind`."""
