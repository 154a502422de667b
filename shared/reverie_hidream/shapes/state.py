"""The state of a training run as one safetensors file that is replaced in one go.

Tensors are named `<group>/<name>`; the step and what the run depends on are JSON in the file's header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedState:
    """What a state file holds."""

    step: int
    """Steps done."""
    groups: Mapping[str, Mapping[str, torch.Tensor]]
    """Tensors on the CPU, by group and name."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
    """Write a file that is whole or not there; an older one of the same name stays until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, partial, metadata={"reverie": json.dumps(dict(header), sort_keys=True)})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the header of a file."""
    with safe_open(path, framework="pt") as file:
        header: dict[str, Any] = json.loads(file.metadata()["reverie"])
        # Copies: what is read must not change with the file.
        return {name: file.get_tensor(name).clone() for name in file.keys()}, header  # noqa: SIM118 (not a dict)


def save_state(path: Path, step: int, groups: Mapping[str, Mapping[str, torch.Tensor]], run: Mapping[str, Any]) -> None:
    """Write the state after a step.

    Args:
        run: what a resumed run must share, as JSON.
    """
    tensors = {f"{group}/{name}": tensor for group, content in groups.items() for name, tensor in content.items()}
    write_tensors(path, tensors, {"step": step, "run": run})


def load_state(path: Path, run: Mapping[str, Any]) -> SavedState | None:
    """The state in a file, or None where there is no file.

    Raises:
        ValueError: it is of a run with other settings.
    """
    if not path.is_file():
        return None
    tensors, header = read_tensors(path)
    # Through JSON, as the saved one went: a tuple comes back as a list.
    wanted = json.loads(json.dumps(dict(run)))
    differing = sorted(
        name for name in wanted.keys() | header["run"].keys() if wanted.get(name) != header["run"].get(name)
    )
    if differing:
        raise ValueError(
            f"{path} is of a run with other {', '.join(differing)}; give the same settings, or another work directory"
        )
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for label, tensor in tensors.items():
        group, name = label.split("/", 1)
        groups.setdefault(group, {})[name] = tensor
    return SavedState(step=header["step"], groups=groups)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The optimiser's state by parameter and slot; empty before the first step."""
    return {
        f"{name}:{slot}": value
        for name, parameter in names.items()
        for slot, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Take up what `optimizer_tensors` gave, on the parameters' devices."""
    for label, tensor in tensors.items():
        name, slot = label.rsplit(":", 1)
        # AdamW counts steps on the CPU.
        device = "cpu" if slot == "step" else names[name].device
        optimizer.state[names[name]][slot] = tensor.to(device)
