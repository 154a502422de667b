"""The whole state of any optimiser as plain tensors, for checkpoints without pickle.

Tensors are kept as they are, quantised ones part by part; everything else - step counts, Prodigy's estimates, lists of
matrices - is JSON, which keeps a float64 to the last bit, inside a tensor of bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

PYTHON_KEY = "python"
"""Name of the tensor of bytes that holds the JSON."""

_FIXED = frozenset({"params", "lr"})


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All state of an optimiser, as `<parameter index>.<name>`, in a fixed order, on the CPU; empty before a step.

    With the parameters and the learning rate it is everything that a resumed run needs.
    """
    if not any(optimizer.state.values()):
        return {}
    tensors: dict[str, torch.Tensor] = {}
    parameters = _parameters(optimizer)
    record = {
        "optimizer": type(optimizer).__name__,
        "shapes": [list(parameter.shape) for parameter in parameters],
        "groups": [_encode_group(optimizer, index, tensors) for index in range(len(optimizer.param_groups))],
        "states": [
            _encode(optimizer.state.get(parameter, {}), f"{index:05d}", parameter.device, tensors)
            for index, parameter in enumerate(parameters)
        ],
    }
    body = json.dumps(record, separators=(",", ":")).encode()
    tensors[PYTHON_KEY] = torch.frombuffer(bytearray(body), dtype=torch.uint8)
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Take up the state that `optimizer_tensors` gave, in an optimiser of the same kind over the same parameters.

    Settings that do not change while it runs, such as weight decay, stay those that it was built with.

    Raises:
        ValueError: the state is of another optimiser, or of other parameters. Nothing is changed.
    """
    if not tensors:
        return
    parameters = _parameters(optimizer)
    record = _read_record(tensors)
    if record["optimizer"] != type(optimizer).__name__:
        raise ValueError(
            f"the saved state is of {record['optimizer']}, the optimiser is {type(optimizer).__name__}; "
            "resume with the same optimizer, or begin with the adapter alone"
        )
    shapes = [list(parameter.shape) for parameter in parameters]
    if record["shapes"] != shapes:
        raise ValueError(_shape_difference(record["shapes"], shapes))
    states = [
        _decode(state, parameter.device, tensors) for state, parameter in zip(record["states"], parameters, strict=True)
    ]
    groups = [
        _decode(group, optimizer.param_groups[index]["params"][0].device, tensors)
        for index, group in enumerate(record["groups"])
    ]
    for parameter, state in zip(parameters, states, strict=True):
        if state:
            optimizer.state[parameter] = state
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group.update(values)


def _read_record(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    if PYTHON_KEY not in tensors:
        raise ValueError(f"the saved optimiser state has no {PYTHON_KEY!r}: it is incomplete or of an older version")
    record: dict[str, Any] = json.loads(tensors[PYTHON_KEY].cpu().numpy().tobytes())
    return record


def _shape_difference(saved: list[list[int]], ours: list[list[int]]) -> str:
    if len(saved) != len(ours):
        return f"the saved optimiser state is of {len(saved)} parameters, the adapter has {len(ours)}"
    index = next(index for index, shapes in enumerate(zip(saved, ours, strict=True)) if shapes[0] != shapes[1])
    return f"optimiser state {index:05d} has shape {tuple(saved[index])}, its parameter {tuple(ours[index])}"


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _encode_group(optimizer: torch.optim.Optimizer, index: int, tensors: dict[str, torch.Tensor]) -> Any:
    """What an optimiser has changed in a group since it was built."""
    group = optimizer.param_groups[index]
    changed = {
        key: value
        for key, value in group.items()
        if key not in _FIXED and not (key in optimizer.defaults and _is_same(value, optimizer.defaults[key]))
    }
    return _encode(changed, f"group{index}", group["params"][0].device, tensors)


def _is_same(value: Any, default: Any) -> bool:
    return not isinstance(value, torch.Tensor) and type(value) is type(default) and bool(value == default)


def _encode(value: Any, key: str, device: torch.device, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON for a value, whose tensors go into `tensors`; `device` is that of the parameter."""
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, key, device, tensors)
    if isinstance(value, dict):
        return {"dict": {name: _encode(value[name], f"{key}.{name}", device, tensors) for name in sorted(value)}}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{key}.{index}", device, tensors) for index, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"optimiser state {key} is a {type(value).__name__}, which a checkpoint cannot hold")


def _encode_tensor(value: torch.Tensor, key: str, device: torch.device, tensors: dict[str, torch.Tensor]) -> Any:
    if type(value) is torch.Tensor:
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        # Some step counts stay in host memory, wherever the parameters are.
        record = {"tensor": key, "host": value.device.type == "cpu" != device.type}
        # A matrix product rounds differently for another order in memory, which a file does not keep.
        return record if value.is_contiguous() else {**record, "stride": list(value.stride())}
    subclass: Any = value
    names, context = subclass.__tensor_flatten__()
    return {
        "subclass": type(value).__name__,
        "parts": {name: _encode(getattr(value, name), f"{key}.{name}", device, tensors) for name in names},
        "context": _encode(context, key, device, tensors),
    }


def _decode(value: Any, device: torch.device, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return _decode_tensor(value, device, tensors)
    if "dict" in value:
        return {name: _decode(item, device, tensors) for name, item in value["dict"].items()}
    if "list" in value:
        return [_decode(item, device, tensors) for item in value["list"]]
    if "tuple" in value:
        return tuple(_decode(item, device, tensors) for item in value["tuple"])
    if "dtype" in value:
        return getattr(torch, value["dtype"])
    return _decode_subclass(value, device, tensors)


def _decode_tensor(value: dict[str, Any], device: torch.device, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    saved = tensors[value["tensor"]].to("cpu" if value["host"] else device, copy=True)
    if "stride" not in value:
        return saved
    return torch.empty_strided(saved.shape, value["stride"], dtype=saved.dtype, device=saved.device).copy_(saved)


def _decode_subclass(value: dict[str, Any], device: torch.device, tensors: Mapping[str, torch.Tensor]) -> Any:
    # The only classes that an optimiser here keeps its state in; a name out of a file never chooses what is imported.
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit
    from torchao.optim.subclass_fp8 import OptimStateFp8

    classes = {known.__name__: known for known in (OptimState4bit, OptimState8bit, OptimStateFp8)}
    if value["subclass"] not in classes:
        raise ValueError(f"the saved optimiser state holds a {value['subclass']}, which is none of {sorted(classes)}")
    parts = {name: _decode(part, device, tensors) for name, part in value["parts"].items()}
    return classes[value["subclass"]].__tensor_unflatten__(parts, _decode(value["context"], device, tensors))
