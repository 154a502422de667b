"""The tensors of one module in an adapter file, and the branch that they make (spec 4.6, 4.8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from reverie_hidream.adapters.algorithms import DORA_KEY
from reverie_hidream.adapters.branch import Branch
from reverie_hidream.adapters.dora import DoraBranch
from reverie_hidream.adapters.kronecker import FACTOR_NAMES, LokrBranch
from reverie_hidream.adapters.lora import MAGNITUDE
from reverie_hidream.adapters.low_rank import DOWN, UP, GloraBranch, LohaBranch, LowRankBranch
from reverie_hidream.adapters.whole_weight import FullMatrixBranch, Ia3Branch, RotationBranch

LORA_DOWN, LORA_UP = "lora_A.weight", "lora_B.weight"
ALPHA = "alpha"
UNSUPPORTED: Mapping[str, str] = {
    **dict.fromkeys(
        ("lokr_t2", "hada_t1", "hada_t2", "lora_mid.weight", "bm.weight"),
        "a Tucker factor of a convolution, and HiDream's transformer has none",
    ),
    **dict.fromkeys(("lambda_layer", "q_layer.weight", "p_layer.weight"), "T-LoRA, which cannot be read back exactly"),
    **dict.fromkeys(("w_norm", "b_norm"), "a change of a LayerNorm with weights, and HiDream has none"),
}
"""Names of LyCORIS that cannot mean anything here."""


class AdapterFileError(ValueError):
    """An adapter file that cannot be used on this model; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleTensors:
    """What a file holds for one Linear."""

    name: str
    """`lycoris_<dotted path with _>`."""
    tensors: Mapping[str, torch.Tensor]
    """By their names after the module's."""
    size: tuple[int, int]
    """(out_features, in_features) of the Linear."""
    multiplier: float
    lora_alpha: float | None
    """Alpha of a LoRA without a tensor for it: that of the metadata; None for the rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """Tensors of one algorithm."""

    names: tuple[str, ...]
    read: Callable[[ModuleTensors], Branch]
    optional: tuple[str, ...] = ()
    needs_alpha: bool = True


def read_branch(module: ModuleTensors) -> Branch:
    """Make the frozen branch of one module.

    Raises:
        AdapterFileError: the tensors do not belong together, or to this Linear.
    """
    kind = _kind_of(module)
    for name, tensor in module.tensors.items():
        if name == ALPHA and tensor.numel() != 1:
            raise AdapterFileError(f"{module.name}: alpha must be one number; got shape {tuple(tensor.shape)}")
    if kind.needs_alpha and ALPHA not in module.tensors:
        raise AdapterFileError(
            f"{module.name} has no alpha, so its scale is unknown; the file is not complete, export it again"
        )
    branch = kind.read(module)
    if (branch.out_features, branch.in_features) != module.size:
        raise _other_size(module, f"changes a {branch.out_features}x{branch.in_features} weight")
    magnitude = module.tensors.get(DORA_KEY, module.tensors.get(MAGNITUDE))
    if magnitude is None:
        return branch
    if magnitude.numel() != module.size[0]:
        raise AdapterFileError(
            f"{module.name}: dora_scale must hold {module.size[0]} numbers, one for each output; "
            f"got shape {tuple(magnitude.shape)}"
        )
    return DoraBranch(branch, magnitude, is_length_fixed=True, key=DORA_KEY)


def _kind_of(module: ModuleTensors) -> _Kind:
    present = module.tensors.keys() - {ALPHA, DORA_KEY, MAGNITUDE}
    for kind in _KINDS:
        if present & set(kind.names):
            missing = [name for name in kind.names if name not in present]
            extra = sorted(present - set(kind.names) - set(kind.optional))
            if missing or extra:
                what = f"lacks {', '.join(missing)}" if missing else f"also has {', '.join(extra)}"
                raise AdapterFileError(f"{module.name} has {', '.join(sorted(present))} and {what}")
            return kind
    if present & set(FACTOR_NAMES):
        return _Kind(names=(), read=_lokr)
    raise AdapterFileError(f"{module.name} has nothing that changes a weight: {sorted(module.tensors)}")


def _lokr(module: ModuleTensors) -> Branch:
    factors = {name: tensor for name, tensor in module.tensors.items() if name in FACTOR_NAMES}
    for part in ("lokr_w1", "lokr_w2"):
        halves = {f"{part}_a", f"{part}_b"} & factors.keys()
        if (part in factors) == bool(halves) or len(halves) == 1:
            raise AdapterFileError(
                f"{module.name} needs either {part} or {part}_a and {part}_b; it has {sorted(factors)}"
            )
    _require_matrices(module, factors)
    for part in ("lokr_w1", "lokr_w2"):
        if part not in factors:
            _require_rank(module, f"{part}_a", f"{part}_b")
    return LokrBranch(module.name, factors, alpha=_alpha(module), multiplier=module.multiplier)


def _locon(module: ModuleTensors) -> Branch:
    _require_matrices(module, module.tensors, UP, DOWN)
    _require_rank(module, UP, DOWN)
    return _low_rank(module, UP, DOWN, _alpha(module))


def _lora(module: ModuleTensors) -> Branch:
    _require_matrices(module, module.tensors, LORA_UP, LORA_DOWN)
    _require_rank(module, LORA_UP, LORA_DOWN)
    rank = module.tensors[LORA_DOWN].shape[0]
    alpha = _alpha(module) if ALPHA in module.tensors else module.lora_alpha or rank
    return _low_rank(module, LORA_UP, LORA_DOWN, alpha)


def _low_rank(module: ModuleTensors, up: str, down: str, alpha: float) -> Branch:
    size = (module.tensors[up].shape[0], module.tensors[down].shape[1])
    return LowRankBranch(
        module.name,
        {UP: module.tensors[up], DOWN: module.tensors[down]},
        size=size,
        alpha=alpha,
        multiplier=module.multiplier,
    )


def _loha(module: ModuleTensors) -> Branch:
    _require_matrices(module, module.tensors, *LohaBranch.factor_names)
    _require_rank(module, "hada_w1_a", "hada_w1_b")
    _require_rank(module, "hada_w2_a", "hada_w2_b")
    factors = {name: module.tensors[name] for name in LohaBranch.factor_names}
    size = (factors["hada_w1_a"].shape[0], factors["hada_w1_b"].shape[1])
    if size != (factors["hada_w2_a"].shape[0], factors["hada_w2_b"].shape[1]):
        raise AdapterFileError(f"{module.name}: the two products of LoHa have different sizes")
    return LohaBranch(module.name, factors, size=size, alpha=_alpha(module), multiplier=module.multiplier)


def _glora(module: ModuleTensors) -> Branch:
    _require_matrices(module, module.tensors, *GloraBranch.factor_names)
    factors = {name: module.tensors[name] for name in GloraBranch.factor_names}
    rank = factors["a2.weight"].shape[0]
    shapes = {
        "a1.weight": (module.size[1], rank),
        "a2.weight": (rank, module.size[1]),
        "b1.weight": (module.size[0], rank),
        "b2.weight": (rank, module.size[1]),
    }
    _require_shapes(module, shapes)
    return GloraBranch(module.name, factors, size=module.size, alpha=_alpha(module), multiplier=module.multiplier)


def _ia3(module: ModuleTensors) -> Branch:
    on_input = bool(module.tensors["on_input"].item())
    _require_shapes(module, {"weight": (module.size[1 if on_input else 0],)})
    return Ia3Branch(
        module.name,
        {"weight": module.tensors["weight"]},
        on_input=on_input,
        size=module.size,
        multiplier=module.multiplier,
    )


def _full(module: ModuleTensors) -> Branch:
    shapes: dict[str, tuple[int, ...]] = {"diff": module.size, "diff_b": module.size[:1]}
    _require_shapes(module, {name: shape for name, shape in shapes.items() if name in module.tensors})
    factors = {name: module.tensors[name] for name in shapes if name in module.tensors}
    return FullMatrixBranch(module.name, factors, size=module.size, multiplier=module.multiplier)


def _rotation(module: ModuleTensors) -> Branch:
    blocks = module.tensors["oft_blocks"]
    shape = tuple(blocks.shape)
    if blocks.ndim not in (3, 4) or shape[-1] != shape[-2] or shape[-3] * shape[-1] != module.size[0]:
        raise _other_size(module, f"has rotations of shape {shape}")
    factors = {name: module.tensors[name] for name in RotationBranch.factor_names if name in module.tensors}
    if "rescale" in factors and factors["rescale"].numel() != module.size[0]:
        raise _other_size(module, f"has scales of shape {tuple(factors['rescale'].shape)}")
    return RotationBranch(
        module.name, factors, constraint=_alpha(module), size=module.size, multiplier=module.multiplier
    )


_KINDS = (
    _Kind(names=(LORA_UP, LORA_DOWN), read=_lora, needs_alpha=False),
    _Kind(names=(UP, DOWN), read=_locon),
    _Kind(names=LohaBranch.factor_names, read=_loha),
    _Kind(names=GloraBranch.factor_names, read=_glora),
    _Kind(names=("diff",), optional=("diff_b",), read=_full, needs_alpha=False),
    _Kind(names=("oft_blocks",), optional=("rescale",), read=_rotation),
    _Kind(names=("weight", "on_input"), read=_ia3, needs_alpha=False),
)

KNOWN_NAMES = tuple(
    sorted(
        {
            *FACTOR_NAMES,
            *(name for kind in _KINDS for name in (*kind.names, *kind.optional)),
            ALPHA,
            DORA_KEY,
            MAGNITUDE,
        },
        key=len,
        reverse=True,
    )
)
"""What a key of a file may end with, after the module's name; the longest first."""


def _alpha(module: ModuleTensors) -> float:
    return float(module.tensors[ALPHA])


def _require_matrices(module: ModuleTensors, tensors: Mapping[str, torch.Tensor], *names: str) -> None:
    shapes = {name: tuple(tensors[name].shape) for name in names or tensors}
    if any(len(shape) != 2 for shape in shapes.values()):
        raise AdapterFileError(f"{module.name}: the factors must be matrices; got {shapes}")


def _require_rank(module: ModuleTensors, left: str, right: str) -> None:
    """Refuse two factors that cannot be multiplied."""
    shapes = tuple(module.tensors[left].shape), tuple(module.tensors[right].shape)
    if shapes[0][1] != shapes[1][0]:
        raise AdapterFileError(
            f"{module.name}: {left} {shapes[0]} and {right} {shapes[1]} have different ranks, or one is transposed"
        )


def _require_shapes(module: ModuleTensors, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if tuple(module.tensors[name].shape) != shape:
            raise _other_size(module, f"has {name} of shape {tuple(module.tensors[name].shape)}, expected {shape}")


def _other_size(module: ModuleTensors, what: str) -> AdapterFileError:
    rows, columns = module.size
    return AdapterFileError(
        f"the adapter is for another model, or a tensor is transposed: {module.name} {what}; "
        f"the Linear is {rows}x{columns}"
    )


def linear_size(linear: nn.Linear) -> tuple[int, int]:
    """(out_features, in_features)."""
    return linear.out_features, linear.in_features
