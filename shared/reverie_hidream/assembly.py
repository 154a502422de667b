"""Putting a transformer together part by part, so that its unquantised weights never lie anywhere at once.

A part is one block, or one of the modules around the blocks. The released transformer has 34 GB in bfloat16 and its
largest part 0.9 GB: quantising part by part needs the result and one part, on the host as on the device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import nn

from reverie_hidream.quantise import quantise

INDEX_SUFFIX = ".safetensors.index.json"


class WeightSource(Protocol):
    """Where the weights of a part come from."""

    def __call__(self, name: str, part: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
        """Give real weights to a part that is on the meta device.

        Args:
            name: dotted name of the part in the transformer.
        """


def parts_of(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts with their dotted names, in the model's order."""
    for name, child in transformer.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{index}", part) for index, part in enumerate(child))
        else:
            yield name, child


def assemble(
    transformer: nn.Module,
    source: WeightSource,
    *,
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    quantize_via: str = "accelerator",
    on_part: Callable[[str, nn.Module], None] | None = None,
) -> None:
    """Give weights to a transformer that is on the meta device, quantise them, and move them to the device. Blocks.

    Args:
        dtype: of the weights that are not quantised.
        quantize_via: `accelerator` reads and quantises on the device, `cpu` on the CPU.
        on_part: called with each finished part and its name, before the next one is read.

    Raises:
        ValueError: the precision cannot be made there, or the source gave a part no weights.
    """
    stage = torch.device("cpu") if quantize_via == "cpu" else device
    for name, part in parts_of(transformer):
        source(name, part, device=stage, dtype=dtype)
        _require_weights(name, part)
        quantise(part, precision)
        part.to(device)
        if on_part is not None:
            on_part(name, part)


class CheckpointWeights:
    """The weights in a directory of safetensors, read when they are asked for. Use as a context manager."""

    def __init__(self, directory: Path) -> None:
        """Find out which file has which tensor.

        Raises:
            FileNotFoundError: there are no weights.
        """
        self._directory = directory
        self._files = _files_by_tensor(directory)
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> CheckpointWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, name: str, part: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
        """See WeightSource.

        Raises:
            OSError: a tensor is missing, or of another shape.
        """
        wanted = {key: f"{name}.{key}" for key in part.state_dict()}
        missing = sorted(full for full in wanted.values() if full not in self._files)
        if missing:
            raise OSError(f"{self._directory} lacks {len(missing)} tensors, the first is {missing[0]}")
        state = {key: self._read(full, device).to(dtype) for key, full in wanted.items()}
        try:
            part.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            raise OSError(f"the weights in {self._directory} do not fit its config.json: {error}") from error

    def _read(self, name: str, device: torch.device) -> torch.Tensor:
        file = self._files[name]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(
                safe_open(self._directory / file, framework="pt", device=str(device))
            )
        tensor: torch.Tensor = self._open[file].get_tensor(name)
        return tensor


def _files_by_tensor(directory: Path) -> Mapping[str, str]:
    for index in sorted(directory.glob(f"*{INDEX_SUFFIX}")):
        files: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return files
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path.name))
    if not found:
        raise FileNotFoundError(f"there are no *.safetensors in {directory}")
    return found


def _require_weights(name: str, part: nn.Module) -> None:
    tensors = (*part.named_parameters(), *part.named_buffers())
    left = [key for key, tensor in tensors if tensor.is_meta]
    if left:
        raise ValueError(f"{len(left)} tensors of {name} got no weights, the first is {left[0]}")
