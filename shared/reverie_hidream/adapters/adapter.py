"""What training and drawing know of an adapter, and the adapter that is made of branches (spec 4.4 to 4.8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from reverie_common.storage.tensors import pack_tensors
from torch import nn

from reverie_hidream.adapters.branch import Branch, hook, unhook
from reverie_hidream.adapters.config import LokrConfig, LycorisConfig
from reverie_hidream.adapters.dropout import AdapterClock
from reverie_hidream.tensor_io import to_raw

CONFIG_KEY = "lycoris_config"
"""Metadata key of an adapter file that holds the configuration as JSON (spec 4.6)."""


_EXACT = ("alpha", "dora_scale", "lora_magnitude_vector", "rescale")
"""Tensors that keep their dtype in a file: they scale whole weights, so that rounding them to bfloat16 would change the
base model by more than a short training changes it."""


class AdapterSize(NamedTuple):
    """What a configuration adapts."""

    num_modules: int
    num_parameters: int


class TrainableAdapter(Protocol):
    """Anything that is trained on, or loaded onto, a transformer."""

    @property
    def selected(self) -> Sequence[str]:
        """Dotted names of the modules that are changed, in the model's order."""

    @property
    def num_modules(self) -> int:
        """Number of modules that are changed."""

    @property
    def num_parameters(self) -> int:
        """Number of trainable numbers."""

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable tensors by name, in a fixed order; empty for a loaded, frozen adapter."""

    def parameters(self) -> list[nn.Parameter]:
        """Trainable tensors, in a fixed order."""

    def raw_state(self) -> dict[str, torch.Tensor]:
        """Copies of all tensors on the CPU: what an exact resume needs (spec 4.7)."""

    def load_raw_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up what `raw_state` gave.

        Raises:
            ValueError: other names or shapes: the state is of another configuration. Nothing is changed.
        """

    def export(self, metadata: Mapping[str, str] | None = None, *, dtype: torch.dtype = torch.bfloat16) -> bytes:
        """The adapter as a file that `load_adapter` reads. The same state and metadata give the same bytes.

        Args:
            metadata: more entries for the file's metadata.
            dtype: of the numbers; alphas, and what scales whole weights, keep theirs.
        """

    def train(self, mode: bool = True) -> None:
        """Switch the dropouts on or off."""

    def begin_step(self, step: int, micro_batch: int) -> None:
        """Say where training is: the dropouts are functions of the seed, of this, and of nothing else."""

    def set_strength(self, strength: float) -> None:
        """Scale the adapter's effect: 1.0 as trained, 0.0 the base model, to the last bit."""

    def detach(self) -> None:
        """Take the adapter off the model. Its tensors stay; may be repeated."""


class FileFormat(Protocol):
    """How the branches of an adapter are written into a file."""

    def tensors(self, branches: Mapping[str, Branch]) -> dict[str, torch.Tensor]:
        """The file's tensors; `branches` are by dotted module name."""

    def metadata(self, branches: Mapping[str, Branch], /) -> dict[str, str]:
        """What the format itself writes into the metadata."""


class LycorisFormat:
    """LyCORIS' files: `lycoris_<path with _>.<factor>` and the configuration as metadata (spec 4.6)."""

    def __init__(self, config: LokrConfig | LycorisConfig) -> None:
        """Write files that state this configuration."""
        self._config = config

    def tensors(self, branches: Mapping[str, Branch]) -> dict[str, torch.Tensor]:
        """See FileFormat."""
        return {
            f"{branch.name}.{name}": tensor
            for branch in branches.values()
            for name, tensor in branch.exported().items()
        }

    def metadata(self, _: Mapping[str, Branch], /) -> dict[str, str]:
        """See FileFormat."""
        return {CONFIG_KEY: self._config.to_json()}


class BranchAdapter:
    """Branches hooked into the Linears of a frozen model.

    The model's own parameters and state dict are untouched; `detach` restores its forward exactly.
    """

    def __init__(
        self,
        branches: Mapping[str, Branch],
        linears: Mapping[str, nn.Module],
        file_format: FileFormat,
        *,
        clock: AdapterClock | None = None,
    ) -> None:
        """Hook the branches in.

        Args:
            branches: by dotted module name.
            linears: the same names' modules.
            clock: shared with the branches' dropouts; None for a frozen adapter, which has none.
        """
        self._branches = dict(branches)
        self._linears = dict(linears)
        self._format = file_format
        self._clock = clock or AdapterClock(seed=0, is_training=False)
        for name, branch in self._branches.items():
            hook(self._linears[name], branch)

    @property
    def selected(self) -> list[str]:
        """See TrainableAdapter."""
        return list(self._branches)

    @property
    def num_modules(self) -> int:
        """See TrainableAdapter."""
        return len(self._branches)

    @property
    def num_parameters(self) -> int:
        """See TrainableAdapter; scalars included."""
        return sum(tensor.numel() for tensor in self._tensors().values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """See TrainableAdapter: `<lora name>.<factor>`."""
        return {name: tensor for name, tensor in self._tensors().items() if isinstance(tensor, nn.Parameter)}

    def parameters(self) -> list[nn.Parameter]:
        """See TrainableAdapter."""
        return list(self.named_parameters().values())

    def raw_state(self) -> dict[str, torch.Tensor]:
        """See TrainableAdapter: scalars are apart."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._tensors().items()}

    @torch.no_grad()
    def load_raw_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """See TrainableAdapter."""
        tensors = self._tensors()
        check_state(tensors, state)
        for name, tensor in tensors.items():
            tensor.copy_(state[name])

    def export(self, metadata: Mapping[str, str] | None = None, *, dtype: torch.dtype = torch.bfloat16) -> bytes:
        """See TrainableAdapter."""
        tensors = {
            name: tensor if _stays_exact(name, tensor) else tensor.to(dtype)
            for name, tensor in self._format.tensors(self._branches).items()
        }
        entries = {**(metadata or {}), **self._format.metadata(self._branches)}
        return pack_tensors({name: to_raw(tensor) for name, tensor in tensors.items()}, entries)

    def train(self, mode: bool = True) -> None:
        """See TrainableAdapter."""
        self._clock.is_training = mode

    def begin_step(self, step: int, micro_batch: int) -> None:
        """See TrainableAdapter."""
        self._clock.step, self._clock.micro_batch = step, micro_batch

    def set_strength(self, strength: float) -> None:
        """See TrainableAdapter."""
        for branch in self._branches.values():
            branch.strength = strength

    def detach(self) -> None:
        """See TrainableAdapter."""
        for name, branch in self._branches.items():
            unhook(self._linears[name], branch)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{branch.name}.{name}": tensor
            for branch in self._branches.values()
            for name, tensor in branch.named_tensors()
        }


def _stays_exact(name: str, tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or name.rpartition(".")[2] in _EXACT


def check_state(tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """Refuse a saved state of other names or shapes.

    Raises:
        ValueError: says how many differ, and names the first.
    """
    if missing := sorted(tensors.keys() - state.keys()) + sorted(state.keys() - tensors.keys()):
        raise ValueError(
            f"the saved state is of another adapter: {len(missing)} names differ, the first is {missing[0]}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"saved {name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
