"""How many numbers an adapter trains in one Linear layer, by its algorithm and settings (spec 4.3, 4.8).

The worker builds the real tensors with torch; a test holds these figures against them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

from reverie_common.lycoris_presets import butterfly_factorization, factorization

from reverie_trainer.jobs.spec import LokrAdapter, LokrOverrides, LoraAdapter, LycorisAdapter

TRUE_WORDS, FALSE_WORDS = ("true", "1", "yes"), ("false", "0", "no")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleSettings:
    """What shapes the adapter of one Linear: a configuration with its overrides applied."""

    algo: str
    linear_dim: int
    linear_alpha: float = 1.0
    use_scalar: bool = False
    dora_wd: bool = False
    factor: int = -1
    full_matrix: bool = False
    decompose_both: bool = False
    block_size: int = 4
    constraint: float = 0.0
    rescaled: bool = False
    train_on_input: bool = False


OPTION_TYPES: Mapping[str, type] = {
    "factor": int,
    "full_matrix": bool,
    "decompose_both": bool,
    "block_size": int,
    "constraint": float,
    "rescaled": bool,
    "train_on_input": bool,
}
"""What `adapter.lycoris.options` may hold: what one algorithm alone knows."""

KNOWN_SETTINGS: Mapping[str, frozenset[str]] = {
    "lokr": frozenset({"dora_wd", "use_scalar", "factor", "full_matrix", "decompose_both"}),
    "locon": frozenset({"dora_wd", "use_scalar"}),
    "lora": frozenset({"dora_wd", "use_scalar"}),
    "loha": frozenset({"dora_wd", "use_scalar"}),
    "ia3": frozenset({"train_on_input"}),
    "dylora": frozenset({"block_size"}),
    "glora": frozenset({"use_scalar"}),
    "full": frozenset(),
    "diag-oft": frozenset({"constraint", "rescaled"}),
    "boft": frozenset({"constraint", "rescaled"}),
}
"""The algorithms, and what of their settings each knows."""


def settings_of(adapter: LokrAdapter | LycorisAdapter, overrides: LokrOverrides | None) -> ModuleSettings:
    """Return what holds for a module with these overrides.

    Raises:
        ValueError: an option is no word of its type.
    """
    names = {item.name for item in fields(ModuleSettings)}
    own = {item.name: getattr(adapter, item.name) for item in fields(adapter) if item.name in names}
    if isinstance(adapter, LycorisAdapter):
        own |= {name: option_value(name, text) for name, text in adapter.options.items() if name in OPTION_TYPES}
    settings = ModuleSettings(**{"algo": "lokr", **own})
    given = {item.name: getattr(overrides, item.name) for item in fields(LokrOverrides)} if overrides else {}
    return replace(settings, **{name: value for name, value in given.items() if value is not None and name in names})


def option_value(name: str, text: str) -> int | float | bool:
    """Return an option as its type.

    Raises:
        ValueError: says which words the type has.
    """
    kind = OPTION_TYPES[name]
    if kind is bool:
        if text.lower() in (*TRUE_WORDS, *FALSE_WORDS):
            return text.lower() in TRUE_WORDS
        raise ValueError(f"{text[:40]!r} is neither true nor false")
    try:
        return int(text) if kind is int else float(text)
    except ValueError as error:
        raise ValueError(f"{text[:40]!r} is no {'whole number' if kind is int else 'number'}") from error


def module_parameters(shape: tuple[int, int], has_bias: bool, settings: ModuleSettings) -> int:
    """Return the trained numbers of one module over a Linear of `shape` (out_features, in_features).

    Raises:
        ValueError: BOFT cannot split the layer.
    """
    count = _COUNTS[settings.algo](shape, has_bias, settings)
    return count + int(settings.use_scalar) + (shape[0] if settings.dora_wd else 0)


def lora_parameters(shape: tuple[int, int], adapter: LoraAdapter) -> int:
    """Return the trained numbers of one LoRA over a Linear of `shape` (out_features, in_features)."""
    return adapter.rank * sum(shape) + (shape[0] if adapter.use_dora else 0)


def is_split(shape: tuple[int, int], settings: ModuleSettings) -> bool:
    """Return whether a LoKr over a Linear of this shape has a factor that is itself a product of two."""
    return any(_splits(shape, settings))


def _splits(shape: tuple[int, int], settings: ModuleSettings) -> tuple[bool, bool]:
    """Whether W1 and W2 are split."""
    if settings.full_matrix:
        return False, False
    out_small, out_large = factorization(shape[0], settings.factor)
    in_small, in_large = factorization(shape[1], settings.factor)
    is_w1_small = settings.linear_dim < max(out_small, in_small) / 2
    return settings.decompose_both and is_w1_small, settings.linear_dim < max(out_large, in_large) / 2


def _lokr(shape: tuple[int, int], _: bool, settings: ModuleSettings) -> int:
    rank = settings.linear_dim
    out_small, out_large = factorization(shape[0], settings.factor)
    in_small, in_large = factorization(shape[1], settings.factor)
    is_w1_low, is_w2_low = _splits(shape, settings)
    w1 = rank * (out_small + in_small) if is_w1_low else out_small * in_small
    w2 = rank * (out_large + in_large) if is_w2_low else out_large * in_large
    return w1 + w2


def _low_rank(shape: tuple[int, int], _: bool, settings: ModuleSettings) -> int:
    return settings.linear_dim * sum(shape)


def _loha(shape: tuple[int, int], _: bool, settings: ModuleSettings) -> int:
    return 2 * settings.linear_dim * sum(shape)


def _glora(shape: tuple[int, int], _: bool, settings: ModuleSettings) -> int:
    return settings.linear_dim * (shape[0] + 3 * shape[1])


def _ia3(shape: tuple[int, int], _: bool, settings: ModuleSettings) -> int:
    return shape[1 if settings.train_on_input else 0]


def _full(shape: tuple[int, int], has_bias: bool, _: ModuleSettings) -> int:
    return shape[0] * shape[1] + (shape[0] if has_bias else 0)


def _oft(shape: tuple[int, int], _: bool, settings: ModuleSettings) -> int:
    size, count = factorization(shape[0], settings.linear_dim)
    return count * size * size + (shape[0] if settings.rescaled else 0)


def _boft(shape: tuple[int, int], _: bool, settings: ModuleSettings) -> int:
    split = butterfly_factorization(shape[0], settings.linear_dim)
    if split is None:
        raise ValueError(
            f"boft cannot split {shape[0]} outputs into a power of two of blocks of at most linear_dim "
            f"{settings.linear_dim} rows; raise linear_dim, or leave the module out"
        )
    size, count = split
    # Enough butterfly stages for every block to reach every other.
    return count.bit_length() * count * size * size + (shape[0] if settings.rescaled else 0)


_COUNTS: Mapping[str, Callable[[tuple[int, int], bool, ModuleSettings], int]] = {
    "lokr": _lokr,
    "locon": _low_rank,
    "lora": _low_rank,
    "loha": _loha,
    "ia3": _ia3,
    "dylora": _low_rank,
    "glora": _glora,
    "full": _full,
    "diag-oft": _oft,
    "boft": _boft,
}
