"""Names of precisions that jobs may have, and what to use for the others (docs/quantisation.md).

The trainer's own table is in its model library, which a client does not carry; a test holds that both agree.
"""

from collections.abc import Mapping, Sequence

BASE_PRECISIONS: Sequence[str] = (
    "no_change",
    "int8-quanto",
    "int4-quanto",
    "int2-quanto",
    "fp8-quanto",
    "fp8uz-quanto",
    "int8-torchao",
    "fp8wo-torchao",
    "nf4-bnb",
)
"""Of a frozen transformer that an adapter is trained on."""

ENCODER_PRECISIONS: Sequence[str] = (*BASE_PRECISIONS, "int8dq-torchao", "fp8-torchao", "int4-torchao")
"""Of an encoder."""

NEAREST: Mapping[str, str] = {
    "int8dq-torchao": "int8-torchao",
    "fp8-torchao": "fp8wo-torchao",
    "int4-torchao": "int4-quanto",
    "int8dq-int4-torchao": "int8dq-torchao",
    "fp8-int4-torchao": "nf4-bnb",
    "fp8-native": "fp8wo-torchao",
    "fp8-transformerengine": "fp8wo-torchao",
    "int8-sdnq": "int8-quanto",
    "uint8-sdnq": "int8-quanto",
    "int16-sdnq": "no_change",
    "uint16-sdnq": "no_change",
    "fp16-sdnq": "no_change",
    "fp8-sdnq": "fp8wo-torchao",
    "int6-sdnq": "int8-quanto",
    "int5-sdnq": "nf4-bnb",
    "uint5-sdnq": "nf4-bnb",
    "uint4-sdnq": "nf4-bnb",
    "uint3-sdnq": "nf4-bnb",
    "uint2-sdnq": "int2-quanto",
}
"""For every name of SimpleTuner's that is not offered."""


def nearest_precision(name: str, allowed: Sequence[str]) -> str:
    """Say what to use in place of a precision that is not allowed."""
    nearest = NEAREST.get(name, "int8-quanto")
    while nearest not in allowed:
        nearest = NEAREST.get(nearest, "int8-quanto")
    return f"the nearest that works is {nearest}"
