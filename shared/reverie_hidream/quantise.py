"""Weight precisions of a frozen module: as loaded, or int8 by optimum.quanto (spec 5.3)."""

import logging
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

NO_CHANGE = "no_change"
INT8_QUANTO = "int8-quanto"
PRECISIONS = (NO_CHANGE, INT8_QUANTO)

# torch._weight_int8pack_mm reads past the end of a row of any other length (NaN or a crash, torch 2.13 on CPU), and
# quanto calls it for multiples of 4. Every Linear of the released models fits.
_INT8_ROW_MULTIPLE = 16


def check_precision(precision: str) -> None:
    """Refuse a precision that `quantise` does not know, before minutes of loading.

    Raises:
        ValueError: names the value and what is allowed.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not known; use one of {', '.join(PRECISIONS)}")


def quantise(module: nn.Module, precision: str) -> None:
    """Change the precision of the module's weights in place, and freeze all of them.

    `int8-quanto` holds every Linear's weight as int8 with one scale per output row; there is no exclusion list, as
    HiDream needs none. It saves memory, not time: each product takes the weight back to the activations' dtype. An
    adapter cannot be merged into such weights afterwards, so merge first.

    Raises:
        ValueError: the precision is unknown.
    """
    check_precision(precision)
    if precision == INT8_QUANTO:
        _to_int8(module)
    # Only now: quanto's freeze() makes new parameters with requires_grad=True, and backward would then compute a dense
    # weight gradient for every Linear of the frozen base.
    module.requires_grad_(False)


def _to_int8(module: nn.Module) -> None:
    # Importing quanto takes a second and its kernels' registry; plain weights do not pay for it.
    from optimum import quanto

    library: Any = quanto
    linears = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    fitting = [name for name, child in linears.items() if child.in_features % _INT8_ROW_MULTIPLE == 0]
    if len(fitting) < len(linears):
        left = ", ".join(sorted(linears.keys() - set(fitting)))
        logger.warning("left as loaded, inputs not a multiple of %d: %s", _INT8_ROW_MULTIPLE, left)
    library.quantize(module, weights=library.qint8, include=fitting)
    library.freeze(module)
