"""Inputs for comparing our mathematics with diffusers' own on the tiny checkpoint."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from reverie_hidream.adapters import LokrConfig, TrainableAdapter, attach_lokr
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.optimizers import GradientFigures
from reverie_hidream.training.objective import ObjectiveSettings
from reverie_hidream.training.step import StepSettings, TrainingStep
from reverie_hidream.transformer import load_transformer


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One training batch."""

    latents: torch.Tensor
    noise: torch.Tensor
    sigmas: torch.Tensor
    text: TextConditioning


@pytest.fixture(scope="session")
def load_reference(tiny_checkpoint: Path) -> Callable[[torch.dtype], HiDreamImageTransformer2DModel]:
    """Loads the transformer as a reader of diffusers' documentation would."""

    def load(dtype: torch.dtype) -> HiDreamImageTransformer2DModel:
        return HiDreamImageTransformer2DModel.from_pretrained(tiny_checkpoint, subfolder="transformer", dtype=dtype)

    return load


@pytest.fixture(scope="session")
def make_batch(tiny_checkpoint: Path) -> Callable[..., Batch]:
    """Draws a batch for the tiny transformer, 16 text tokens for each encoder; the same numbers in every dtype."""
    config = HiDreamImageTransformer2DModel.load_config(tiny_checkpoint, subfolder="transformer")
    t5_width, llama_width = config["caption_channels"]
    num_layers = max(config["llama_layers"]) + 1

    def make(height: int, width: int, *, batch_size: int = 2, dtype: torch.dtype = torch.float64) -> Batch:
        generator = torch.Generator().manual_seed(1000 * height + width)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        return Batch(
            latents=normal(batch_size, 16, height, width),
            noise=normal(batch_size, 16, height, width),
            sigmas=torch.linspace(0.9, 0.2, batch_size, dtype=torch.float64).to(dtype),
            text=TextConditioning(
                t5=normal(batch_size, 16, t5_width),
                llama=normal(num_layers, batch_size, 16, llama_width),
                pooled=normal(batch_size, config["text_emb_dim"]),
            ),
        )

    return make


@pytest.fixture(scope="session")
def relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Norm of the difference over the norm of the expected tensor."""

    def measure(found: torch.Tensor, expected: torch.Tensor) -> float:
        return float((found.double() - expected.double()).norm() / expected.double().norm())

    return measure


class KeptGradients:
    """An update that steps nothing and leaves the gradients where they are."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = parameters

    def begin(self, learning_rate: float) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def accept(self, loss: torch.Tensor) -> None:
        """Every loss is as good as another."""

    def finish(self, loss: torch.Tensor, others: Sequence[torch.Tensor] = ()) -> GradientFigures:
        return GradientFigures(float(loss), 0.0, 0.0, tuple(float(figure) for figure in others))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """There is nothing to take up."""

    @contextmanager
    def averaged(self) -> Iterator[None]:
        yield


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainee:
    """A model with an adapter that does something, and either our step or none."""

    model: Any
    adapter: TrainableAdapter
    step: TrainingStep

    def gradient(self) -> torch.Tensor:
        """The adapter's gradient as one vector."""
        return flat_gradient(self.adapter)


def flat_gradient(adapter: TrainableAdapter) -> torch.Tensor:
    """The gradient of an adapter as one vector; what got none counts as zeros."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in adapter.parameters()]
    ).clone()


def attach_stirred(model: Any, config: LokrConfig) -> TrainableAdapter:
    """An adapter in float64 that is no longer at its start, where half of the gradient is zero."""
    adapter = attach_lokr(model, config, dtype=torch.float64, seed=1)
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return adapter


ADAPTED = LokrConfig(factor=4)


@pytest.fixture(scope="session")
def make_trainee(tiny_checkpoint: Path) -> Callable[..., Trainee]:
    """Our model and step in float64; `checkpointing`, `num_batches` and the settings of the objective may be given."""

    def make(*, checkpointing: bool = False, num_batches: int = 1, **objective: Any) -> Trainee:
        model = load_transformer(tiny_checkpoint, dtype=torch.float64)
        adapter = attach_stirred(model, ADAPTED)
        settings = StepSettings(
            objective=ObjectiveSettings(**objective),
            gradient_checkpointing=checkpointing,
            gradient_accumulation_steps=num_batches,
        )
        step = TrainingStep(
            model, adapter, KeptGradients(adapter.parameters()), settings, learning_rate=lambda step: 1e-3
        )
        return Trainee(model=model, adapter=adapter, step=step)

    return make


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """diffusers' own model in training mode with gradients through all experts, and the same adapter on it."""

    model: Any
    adapter: TrainableAdapter

    def velocity(self, noisy: torch.Tensor, sigmas: torch.Tensor, text: TextConditioning) -> torch.Tensor:
        """Of diffusers' padded forward."""
        output: torch.Tensor = self.model(
            noisy.double(), 1000 * sigmas, text.t5, text.llama, text.pooled, return_dict=False
        )[0]
        return -output

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """Of the adapter, as one vector."""
        for parameter in self.adapter.parameters():
            parameter.grad = None
        loss.backward()
        return flat_gradient(self.adapter)


@pytest.fixture(scope="session")
def make_training_reference(tiny_checkpoint: Path) -> Callable[[], Reference]:
    """Builds the reference as a reader of diffusers' documentation would, in float64."""

    def make() -> Reference:
        model: Any = HiDreamImageTransformer2DModel.from_pretrained(
            tiny_checkpoint, subfolder="transformer", dtype=torch.float64, force_inference_output=False
        )
        # The experts keep the constructor's False; unpatchify reads the configuration.
        model.register_to_config(force_inference_output=True)
        model.train().requires_grad_(False)
        return Reference(model=model, adapter=attach_stirred(model, ADAPTED))

    return make
