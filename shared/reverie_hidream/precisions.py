"""How weights can be held, by the names of spec 5.3: a table without torch, for settings and the control plane.

`quantise` makes what the table promises. Names that are not in it are refused, with the reason and what works instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

QUANTIZE_VIA = ("accelerator", "cpu")
"""Where a part's weights are quantised before the next part's are read: on the device, or on the CPU and then moved."""

NO_CHANGE = "no_change"
INT8_QUANTO = "int8-quanto"


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """One way to hold the weights of the Linears of a frozen model."""

    library: str
    """`torch`, `quanto`, `torchao` or `bitsandbytes`."""

    bits: float
    """Stored for each weight of a wide layer, scales included; no_change as bfloat16."""

    is_trainable: bool = True
    """Gradients pass through to the inputs, so that an adapter can be trained on top."""

    device_types: tuple[str, ...] = ("cpu", "cuda")
    """Where its products run."""

    row_multiple: int = 1
    """Layers whose inputs are not a multiple are left as loaded; every Linear of the released models fits."""

    output_multiple: int = 1
    """The same for outputs."""

    keeps_copies: bool = False
    """Autograd keeps each weight once more, in the dtype of the activations, until the backward pass of its block."""

    nearest: str = INT8_QUANTO
    """What to use where this one cannot be."""

    def fits(self, in_features: int, out_features: int) -> bool:
        """Whether a Linear of these widths can be held so."""
        return in_features % self.row_multiple == 0 and out_features % self.output_multiple == 0


PRECISIONS: Mapping[str, Precision] = {
    NO_CHANGE: Precision(library="torch", bits=16),
    # torch._weight_int8pack_mm reads past the end of a row of any other length (NaN or a crash, torch 2.13 on CPU), and
    # quanto calls it for multiples of 4.
    INT8_QUANTO: Precision(library="quanto", bits=8, row_multiple=16),
    # torch._convert_weight_to_int4pack_for_cpu, which quanto calls in bfloat16, refuses other outputs.
    "int4-quanto": Precision(library="quanto", bits=4.25, row_multiple=32, output_multiple=16),
    "int2-quanto": Precision(library="quanto", bits=2.25, row_multiple=32),
    "fp8-quanto": Precision(library="quanto", bits=8, row_multiple=16),
    "fp8uz-quanto": Precision(library="quanto", bits=8, row_multiple=16),
    "int8-torchao": Precision(library="torchao", bits=8, keeps_copies=True),
    "fp8wo-torchao": Precision(library="torchao", bits=8, keeps_copies=True),
    "nf4-bnb": Precision(library="bitsandbytes", bits=4.13),
    # Products of quantised activations: their kernels have no backward.
    "int8dq-torchao": Precision(library="torchao", bits=8, is_trainable=False, nearest="int8-torchao"),
    "fp8-torchao": Precision(
        library="torchao", bits=8, is_trainable=False, device_types=("cuda",), row_multiple=16, nearest="fp8wo-torchao"
    ),
    "int4-torchao": Precision(library="torchao", bits=4.5, is_trainable=False, row_multiple=64, nearest="int4-quanto"),
}
"""By name."""

BASE_PRECISIONS = tuple(name for name, precision in PRECISIONS.items() if precision.is_trainable)
"""For a model that an adapter is trained on."""

ENCODER_PRECISIONS = tuple(PRECISIONS)
"""For a model that only computes: text encoders, and the sampler's transformer."""

_NO_BACKWARD = "its kernels have no backward, so no adapter can be trained on it"
_SDNQ = "it is a format of SDNQ, which Reverie does not use"

REFUSED: Mapping[str, tuple[str, str]] = {
    "int8dq-int4-torchao": (
        "torchao 0.18 keeps its 4-bit weights in whole bytes, so it saves no more than int8 at the error of 4 bits",
        "int8dq-torchao",
    ),
    "fp8-int4-torchao": ("torchao 0.18 needs the package mslk for it, which has no build for this Python", "nf4-bnb"),
    "int8-bnb": ("bitsandbytes computes it in float16, which overflows in T5 and Llama", INT8_QUANTO),
    "fp4-bnb": ("its error is larger than nf4's at the same size", "nf4-bnb"),
    "fp8-native": ("it is a plain cast of SimpleTuner's without scales", "fp8wo-torchao"),
    "fp8-transformerengine": ("it needs NVIDIA's Transformer Engine, which Reverie does not use", "fp8wo-torchao"),
    "int8-sdnq": (_SDNQ, INT8_QUANTO),
    "uint8-sdnq": (_SDNQ, INT8_QUANTO),
    "int16-sdnq": (_SDNQ, NO_CHANGE),
    "uint16-sdnq": (_SDNQ, NO_CHANGE),
    "fp16-sdnq": (_SDNQ, NO_CHANGE),
    "fp8-sdnq": (_SDNQ, "fp8wo-torchao"),
    "int6-sdnq": (_SDNQ, INT8_QUANTO),
    "int5-sdnq": (_SDNQ, "nf4-bnb"),
    "uint5-sdnq": (_SDNQ, "nf4-bnb"),
    "uint4-sdnq": (_SDNQ, "nf4-bnb"),
    "uint3-sdnq": (_SDNQ, "nf4-bnb"),
    "uint2-sdnq": (_SDNQ, "int2-quanto"),
}
"""Names of other programs: why not here, and the nearest that works. By name."""


def refusal(name: str, *, is_trained_on: bool, device_type: str | None = None) -> str | None:
    """Say why a precision cannot be used, with what can; None where it can.

    Args:
        is_trained_on: whether gradients have to pass through the model.
        device_type: `cpu` or `cuda`; None where it is not known yet.
    """
    precision = PRECISIONS.get(name)
    if precision is None:
        return _unknown(name, is_trained_on=is_trained_on)
    if is_trained_on and not precision.is_trainable:
        return f"{name!r} cannot be trained on: {_NO_BACKWARD}; use {precision.nearest!r}"
    if device_type is not None and device_type not in precision.device_types:
        needed = " or ".join(precision.device_types)
        return f"{name!r} needs a {needed} device, not {device_type!r}; use {precision.nearest!r}"
    return None


def _unknown(name: str, *, is_trained_on: bool) -> str:
    allowed = BASE_PRECISIONS if is_trained_on else ENCODER_PRECISIONS
    if name in REFUSED:
        reason, nearest = REFUSED[name]
        if nearest not in allowed:
            nearest = PRECISIONS[nearest].nearest
        return f"{name!r} is not supported: {reason}; use {nearest!r}"
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{name[:80]!r} is not known; use one of {', '.join(allowed)}{hint}"
