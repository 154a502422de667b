"""The algorithms of LyCORIS: what each knows, and how its tensors start (spec 4.3, 4.4).

Shapes and starts are those of lycoris-lora's own modules, made on stand-ins without weights; what is computed with them
is in the branches. So an adapter starts the same on a plain and on a quantised base.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from reverie_common.lycoris_presets import butterfly_factorization
from torch import nn

from reverie_hidream.adapters.branch import Branch, dense_weight
from reverie_hidream.adapters.config import AdapterConfigError, LokrConfig, LycorisConfig, ModuleSettings
from reverie_hidream.adapters.dora import DoraBranch, row_lengths
from reverie_hidream.adapters.kronecker import FACTOR_NAMES, LokrBranch
from reverie_hidream.adapters.low_rank import DOWN, UP, DyloraBranch, GloraBranch, LohaBranch, LowRankBranch
from reverie_hidream.adapters.whole_weight import FullMatrixBranch, Ia3Branch, RotationBranch

DORA_KEY = "dora_scale"

Factors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Algorithm:
    """One algorithm of LyCORIS."""

    create: Callable[[str, nn.Module, ModuleSettings], Branch]
    """Makes the branch of a Linear, with tensors on the default device in float32."""
    knows: frozenset[str] = frozenset()
    """Settings of its own that it understands."""


def create_branch(name: str, linear: nn.Module, settings: ModuleSettings) -> Branch:
    """Make the trainable branch of one Linear, plain or quantised, from torch's global generator.

    Raises:
        AdapterConfigError: the algorithm cannot be built for a Linear of this size.
    """
    with _quiet_lycoris():
        branch = ALGORITHMS[settings.algo].create(name, linear, settings)
    if not settings.dora_wd:
        return branch
    lengths = row_lengths(_weight_of(linear))
    return DoraBranch(branch, nn.Parameter(lengths), is_length_fixed=False, key=DORA_KEY)


def check_algorithms(config: LokrConfig | LycorisConfig) -> None:
    """Refuse algorithms that do not exist or do not work here, and settings that an algorithm does not know.

    Raises:
        AdapterConfigError: names each, and what to use.
    """
    settings = {"": config.settings(None)}
    settings |= {f"{path}: ": config.settings(own) for path, own in config.apply_preset.overrides()}
    chosen = {own.algo for own in settings.values()}
    problems = [problem for path, own in settings.items() for problem in _problems(path, own, chosen)]
    if problems:
        raise AdapterConfigError("; ".join(problems))


def _problems(path: str, settings: ModuleSettings, chosen: set[str]) -> Iterator[str]:
    if settings.algo in REFUSED:
        yield f"{path}algo {settings.algo!r} is not supported: {REFUSED[settings.algo]}"
        return
    if settings.algo not in ALGORITHMS:
        yield f"{path}algo {settings.algo!r} is unknown; use one of {', '.join(ALGORITHMS)}"
        return
    known = ALGORITHMS[settings.algo].knows
    # Of a mixture, an option of one algorithm is no business of the others.
    known_by_any = frozenset().union(*(ALGORITHMS[algo].knows for algo in chosen if algo in ALGORITHMS))
    for name, off in _OPTIONAL.items():
        is_known = name in (known if name in _OF_EVERY_MODULE else known_by_any)
        if getattr(settings, name) != off and not is_known:
            knowing = ", ".join(algo for algo, algorithm in ALGORITHMS.items() if name in algorithm.knows)
            yield f"{path}{settings.algo} has no {name}; leave it out, or use one of {knowing}"
    if settings.algo == "dylora" and settings.linear_dim % settings.block_size:
        yield (
            f"{path}linear_dim {settings.linear_dim} is no multiple of block_size {settings.block_size}; "
            "choose another of the two"
        )


_OPTIONAL: Mapping[str, Any] = {
    "dora_wd": False,
    "use_scalar": False,
    "factor": -1,
    "full_matrix": False,
    "decompose_both": False,
    "block_size": 4,
    "constraint": 0.0,
    "rescaled": False,
    "train_on_input": False,
}
"""Settings that not every algorithm knows, with the value that means "not asked for"."""
_OF_EVERY_MODULE = ("dora_wd", "use_scalar")


def _lokr(name: str, linear: nn.Module, settings: ModuleSettings) -> Branch:
    module = _module(LokrModule, name, linear, settings)
    factors = {key: getattr(module, key) for key in FACTOR_NAMES if hasattr(module, key)}
    # Where both parts are whole there is no rank to scale by, and LyCORIS writes linear_dim for alpha (spec 4.4).
    alpha = settings.linear_dim if module.use_w1 and module.use_w2 else _alpha(settings)
    return LokrBranch(name, factors, alpha=alpha, scalar=_scalar(module), multiplier=settings.multiplier)


def _locon(name: str, linear: nn.Module, settings: ModuleSettings) -> Branch:
    module = _module(LoConModule, name, linear, settings)
    return LowRankBranch(
        name, {UP: module.lora_up.weight, DOWN: module.lora_down.weight}, **_common(module, linear, settings)
    )


def _loha(name: str, linear: nn.Module, settings: ModuleSettings) -> Branch:
    module = _module(LohaModule, name, linear, settings)
    factors = {key: getattr(module, key) for key in LohaBranch.factor_names}
    return LohaBranch(name, factors, **_common(module, linear, settings))


def _dylora(name: str, linear: nn.Module, settings: ModuleSettings) -> Branch:
    module = _module(DyLoraModule, name, linear, settings)
    factors = {
        UP: nn.Parameter(torch.cat([block.detach() for block in module.up_list], dim=1)),
        DOWN: nn.Parameter(torch.cat([block.detach() for block in module.down_list])),
    }
    return DyloraBranch(name, factors, block_size=settings.block_size, **_common(module, linear, settings))


def _glora(name: str, linear: nn.Module, settings: ModuleSettings) -> Branch:
    module = _module(GLoRAModule, name, linear, settings)
    factors = {key: module.get_parameter(key) for key in GloraBranch.factor_names}
    return GloraBranch(name, factors, **_common(module, linear, settings))


def _ia3(name: str, linear: nn.Module, settings: ModuleSettings) -> Branch:
    module = _module(IA3Module, name, linear, settings)
    return Ia3Branch(
        name,
        {"weight": module.weight},
        on_input=settings.train_on_input,
        size=_size(linear),
        multiplier=settings.multiplier,
    )


def _full(name: str, linear: nn.Module, settings: ModuleSettings) -> Branch:
    # LyCORIS' module keeps two copies of the weight; the change alone is enough, and works beside a quantised weight.
    factors = {"diff": nn.Parameter(torch.zeros(_size(linear)))}
    if getattr(linear, "bias", None) is not None:
        factors["diff_b"] = nn.Parameter(torch.zeros(_size(linear)[0]))
    return FullMatrixBranch(name, factors, size=_size(linear), multiplier=settings.multiplier)


def _rotation(module_class: Any) -> Callable[[str, nn.Module, ModuleSettings], Branch]:
    def create(name: str, linear: nn.Module, settings: ModuleSettings) -> Branch:
        width = _size(linear)[0]
        if module_class is ButterflyOFTModule and butterfly_factorization(width, settings.linear_dim) is None:
            raise AdapterConfigError(
                f"boft cannot split the {width} outputs of {name} into a power of two of blocks of at most linear_dim "
                f"{settings.linear_dim} rows; raise linear_dim, or leave the module out"
            )
        module = _module(module_class, name, linear, settings)
        factors = {"oft_blocks": module.oft_blocks}
        if settings.rescaled:
            factors["rescale"] = module.rescale
        return RotationBranch(
            name, factors, constraint=settings.constraint, size=_size(linear), multiplier=settings.multiplier
        )

    return create


ALGORITHMS: Mapping[str, Algorithm] = {
    "lokr": Algorithm(
        create=_lokr, knows=frozenset({"dora_wd", "use_scalar", "factor", "full_matrix", "decompose_both"})
    ),
    "locon": Algorithm(create=_locon, knows=frozenset({"dora_wd", "use_scalar"})),
    "lora": Algorithm(create=_locon, knows=frozenset({"dora_wd", "use_scalar"})),
    "loha": Algorithm(create=_loha, knows=frozenset({"dora_wd", "use_scalar"})),
    "ia3": Algorithm(create=_ia3, knows=frozenset({"train_on_input"})),
    "dylora": Algorithm(create=_dylora, knows=frozenset({"block_size"})),
    "glora": Algorithm(create=_glora, knows=frozenset({"use_scalar"})),
    "full": Algorithm(create=_full),
    "diag-oft": Algorithm(create=_rotation(DiagOFTModule), knows=frozenset({"constraint", "rescaled"})),
    "boft": Algorithm(create=_rotation(ButterflyOFTModule), knows=frozenset({"constraint", "rescaled"})),
}
"""By their names in LyCORIS' configurations; `lora` and `locon` are one."""

REFUSED: Mapping[str, str] = {
    "tlora": (
        "its files can only be read back by repeating a singular value decomposition of the frozen weight, whose signs "
        "are not fixed, and it takes the noise level from a variable of the process; use locon"
    ),
    "norm": "it trains LayerNorm and GroupNorm, and HiDream's norms have no weights or are RMSNorm; use lokr",
}
"""Algorithms of lycoris-lora 4.1.3 that do not work here, and why."""


def _module(module_class: Any, name: str, linear: nn.Module, settings: ModuleSettings) -> Any:
    out_features, in_features = _size(linear)
    has_bias = getattr(linear, "bias", None) is not None
    stand_in = nn.Linear(in_features, out_features, bias=has_bias, device="meta")
    return module_class(
        name,
        stand_in,
        lora_dim=settings.linear_dim,
        alpha=settings.linear_alpha,
        use_scalar=settings.use_scalar,
        factor=settings.factor,
        full_matrix=settings.full_matrix,
        decompose_both=settings.decompose_both,
        block_size=settings.block_size,
        constraint=settings.constraint,
        rescaled=settings.rescaled,
        train_on_input=settings.train_on_input,
        bypass_mode=True,
    )


def _common(module: Any, linear: nn.Module, settings: ModuleSettings) -> dict[str, Any]:
    return {
        "size": _size(linear),
        "alpha": _alpha(settings),
        "scalar": _scalar(module) if settings.use_scalar else None,
        "multiplier": settings.multiplier,
    }


def _alpha(settings: ModuleSettings) -> float:
    return settings.linear_alpha or settings.linear_dim


def _scalar(module: Any) -> nn.Parameter | None:
    return module.scalar if isinstance(module.scalar, nn.Parameter) else None


def _size(linear: nn.Module) -> tuple[int, int]:
    layer: Any = linear
    return int(layer.out_features), int(layer.in_features)


def _weight_of(linear: nn.Module) -> torch.Tensor:
    if next(linear.parameters()).is_meta:
        return torch.empty(_size(linear), device="meta")
    return dense_weight(linear, linear.forward)


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
