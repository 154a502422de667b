"""Weight precisions of a frozen module, made by the libraries that own them (spec 5.3).

The names are those of `precisions`. All of them save memory; a product takes the weights back to the dtype of the
activations, except where activations are quantised too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from reverie_hidream.precisions import NO_CHANGE, PRECISIONS, refusal

logger = logging.getLogger(__name__)

_MAX_NAMED = 5
_INT4_GROUP_SIZE = 64


def check_precision(precision: str, *, is_trained_on: bool = False, device: torch.device | str = "cpu") -> None:
    """Refuse a precision that `quantise` cannot make there, before minutes of loading.

    Args:
        is_trained_on: whether gradients have to pass through the model.

    Raises:
        ValueError: names the value, the reason and what works.
    """
    problem = refusal(precision, is_trained_on=is_trained_on, device_type=torch.device(device).type)
    if problem is not None:
        raise ValueError(f"precision {problem}")


def quantise(module: nn.Module, precision: str) -> None:
    """Change the precision of the Linears in a module in place, where its weights are, and freeze all of it.

    There is no exclusion list, as HiDream needs none: embeddings, norms and the experts' gates are no Linears and stay.
    An adapter cannot be merged into such weights afterwards, so merge first. Calling it part by part gives the same
    weights as calling it on the whole.

    Raises:
        ValueError: the precision is unknown, or cannot be made on the module's device.
    """
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    check_precision(precision, device=device)
    if precision != NO_CHANGE:
        _convert(module, precision)
    # Only now: quanto's freeze() makes new parameters with requires_grad=True, and backward would then compute a dense
    # weight gradient for every Linear of the frozen base.
    module.requires_grad_(False)


def weight_bytes(module: nn.Module) -> int:
    """Bytes that the parameters of a module take where they are, scales included."""
    return sum(tensor.nbytes for parameter in module.parameters() for tensor in stored_tensors(parameter))


def stored_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a weight of any precision is made of."""
    names: Sequence[str] = getattr(tensor, "__tensor_flatten__", lambda: ((),))()[0]
    for name in names:
        yield from stored_tensors(getattr(tensor, name))
    if not names:
        yield tensor
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            yield from _bitsandbytes_scales(state)


def _bitsandbytes_scales(state: Any) -> Iterator[torch.Tensor]:
    # Its tables of 16 and 256 values are the same for all weights, but each weight has its own copy.
    yield from (state.absmax, state.code)
    if state.nested:
        yield from (state.offset, state.state2.absmax, state.state2.code)


def _convert(module: nn.Module, precision: str) -> None:
    chosen = PRECISIONS[precision]
    linears = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    fitting = [name for name, child in linears.items() if chosen.fits(child.in_features, child.out_features)]
    if len(fitting) < len(linears):
        left = sorted(linears.keys() - set(fitting))
        more = f" and {len(left) - _MAX_NAMED} more" if len(left) > _MAX_NAMED else ""
        names = ", ".join(left[:_MAX_NAMED])
        outputs = f" or outputs not of {chosen.output_multiple}" if chosen.output_multiple > 1 else ""
        logger.warning("left as loaded, inputs not a multiple of %d%s: %s%s", chosen.row_multiple, outputs, names, more)
    if fitting:
        _BACKENDS[precision](module, fitting)


def _quanto(qtype: str) -> Callable[[nn.Module, Sequence[str]], None]:
    def convert(module: nn.Module, names: Sequence[str]) -> None:
        # Importing a library takes seconds and its kernels' registry; plain weights do not pay for it.
        from optimum import quanto

        library: Any = quanto
        library.quantize(module, weights=getattr(library, qtype), include=list(names))
        library.freeze(module)

    return convert


def _torchao(make_config: Callable[[Any, torch.device], Any]) -> Callable[[nn.Module, Sequence[str]], None]:
    def convert(module: nn.Module, names: Sequence[str]) -> None:
        from torchao import quantization

        library: Any = quantization
        wanted = frozenset(names)
        device = next(module.parameters()).device
        library.quantize_(module, make_config(library, device), filter_fn=lambda _, name: name in wanted)

    return convert


def _int4_config(library: Any, device: torch.device) -> Any:
    if device.type == "cuda":
        return library.Int4WeightOnlyConfig(group_size=_INT4_GROUP_SIZE, int4_packing_format="tile_packed_to_4d")
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=_INT4_GROUP_SIZE)


def _bitsandbytes_nf4(module: nn.Module, names: Sequence[str]) -> None:
    import bitsandbytes

    for name in names:
        parent, _, child = name.rpartition(".")
        linear = module.get_submodule(name)
        setattr(module.get_submodule(parent), child, _nf4_linear(bitsandbytes.nn, linear))


def _nf4_linear(library: Any, linear: Any) -> nn.Module:
    # On the meta device: its own weights would only be thrown away.
    converted: Any = library.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    device = linear.weight.device
    # Stored under the dtype of the activations: T5 casts its activations to the dtype that a weight says it has.
    weight = library.Params4bit(
        linear.weight.detach(), requires_grad=False, quant_type="nf4", quant_storage=linear.weight.dtype
    )
    converted.weight = weight.to(device)
    converted.weight.module = converted
    converted.quant_state = converted.weight.quant_state
    converted.bias = linear.bias
    # Repacked for one kind of CPU, weights have no backward, and embeddings would depend on the machine.
    converted.support_avx512bf16_for_cpu = False
    return converted  # type: ignore[no-any-return]  # the library is untyped


_BACKENDS: Mapping[str, Callable[[nn.Module, Sequence[str]], None]] = {
    "int8-quanto": _quanto("qint8"),
    "int4-quanto": _quanto("qint4"),
    "int2-quanto": _quanto("qint2"),
    "fp8-quanto": _quanto("qfloat8"),
    "fp8uz-quanto": _quanto("qfloat8_e4m3fnuz"),
    "int8-torchao": _torchao(lambda library, _: library.Int8WeightOnlyConfig()),
    "fp8wo-torchao": _torchao(lambda library, _: library.Float8WeightOnlyConfig()),
    "int8dq-torchao": _torchao(lambda library, _: library.Int8DynamicActivationInt8WeightConfig()),
    "fp8-torchao": _torchao(lambda library, _: library.Float8DynamicActivationFloat8WeightConfig()),
    "int4-torchao": _torchao(_int4_config),
    "nf4-bnb": _bitsandbytes_nf4,
}
