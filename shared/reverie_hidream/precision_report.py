"""What each precision costs and saves, measured: `python -m reverie_hidream.precision_report CHECKPOINT [--out FILE]`.

Weight error and size are those of one Linear of the released width with normally distributed weights; the errors of
velocity and gradient are those of the checkpoint's transformer, on random latents and embeddings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reverie_hidream.adapters.config import LokrConfig
from reverie_hidream.adapters.lokr import attach_lokr
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.precisions import BASE_PRECISIONS, PRECISIONS
from reverie_hidream.quantise import quantise, stored_tensors, weight_bytes
from reverie_hidream.transformer import load_transformer, predict_velocity

WIDTH = 2560
"""Of the released model."""

HEADER = (
    "| precision | bits per weight | weight error | kept for backward | velocity error | gradient cosine |",
    "|---|---|---|---|---|---|",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFigures:
    """One wide Linear in one precision."""

    bits: float
    """Stored for each weight, scales included."""
    error: float
    """Norm of the weight's change over its norm."""
    kept_bytes: int
    """What autograd keeps of the weight for the backward pass besides the weight itself, for each weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFigures:
    """One transformer in one precision, against itself as loaded."""

    velocity_error: float
    """Norm of the difference over the norm."""
    gradient_cosine: float | None
    """Between the gradients of a LoKr; None where there is none."""


def measure_layer(precision: str) -> LayerFigures:
    """Measure one bfloat16 Linear with normally distributed weights."""
    linear = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    weight = linear.weight.detach().double()
    holder = nn.Sequential(linear)
    quantise(holder, precision)
    with torch.no_grad():
        used = holder(torch.eye(WIDTH, dtype=torch.bfloat16)).T.double()
    num_bytes = weight_bytes(holder)
    return LayerFigures(
        bits=8 * num_bytes / weight.numel(),
        error=float((used - weight).norm() / weight.norm()),
        kept_bytes=round(_kept_bytes(holder) / weight.numel()),
    )


def measure_model(checkpoint: Path, precision: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The velocity of the checkpoint's transformer in a precision, and the gradient of a LoKr on it as one vector."""
    transformer = load_transformer(checkpoint, precision=precision)
    latents, conditioning = _inputs(transformer.config)
    timesteps = torch.full((1,), 500.0)
    if not PRECISIONS[precision].is_trainable:
        with torch.no_grad():
            return predict_velocity(transformer, latents, timesteps, conditioning), None
    adapter = attach_lokr(transformer, LokrConfig(factor=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    target = torch.randn(latents.shape, generator=generator)
    velocity = predict_velocity(transformer, latents, timesteps, conditioning)
    (velocity - target).square().mean().backward()
    gradients = [parameter.grad.flatten() for parameter in adapter.parameters() if parameter.grad is not None]
    return velocity.detach(), torch.cat(gradients)


def compare(
    found: tuple[torch.Tensor, torch.Tensor | None], expected: tuple[torch.Tensor, torch.Tensor | None]
) -> ModelFigures:
    """Figures of what `measure_model` found against what it found without a change of precision."""
    (velocity, gradient), (plain_velocity, plain_gradient) = found, expected
    cosine = None
    if gradient is not None and plain_gradient is not None:
        cosine = float(torch.nn.functional.cosine_similarity(gradient.double(), plain_gradient.double(), dim=0))
    error = float((velocity - plain_velocity).norm() / plain_velocity.norm())
    return ModelFigures(velocity_error=error, gradient_cosine=cosine)


def report(checkpoint: Path, *, device_type: str = "cpu") -> Iterator[str]:
    """Yield the lines of a Markdown table as they are measured: every precision that runs on the device."""
    yield from HEADER
    plain = measure_model(checkpoint, "no_change")
    for name, precision in PRECISIONS.items():
        if device_type in precision.device_types:
            layer = measure_layer(name)
            yield _row(name, layer, compare(measure_model(checkpoint, name), plain))


def _row(name: str, layer: LayerFigures, model: ModelFigures) -> str:
    trains = name in BASE_PRECISIONS
    kept = f"{layer.kept_bytes} B per weight" if trains else "no backward"
    cosine = "-" if model.gradient_cosine is None else f"{model.gradient_cosine:.4f}"
    return (
        f"| `{name}` | {layer.bits:.2f} | {100 * layer.error:.2f} % | {kept} | {100 * model.velocity_error:.2f} % "
        f"| {cosine} |"
    )


def _kept_bytes(module: nn.Module) -> int:
    """Bytes of tensors of the weight's size that autograd makes and keeps: dequantised copies."""
    own = {tensor.untyped_storage().data_ptr() for weight in module.parameters() for tensor in stored_tensors(weight)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not hasattr(tensor, "__tensor_flatten__"):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    # One row, so that inputs and outputs are nothing beside a weight.
    inputs = torch.ones(1, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = module(inputs)
    return sum(kept.values()) if outputs.requires_grad else 0


def _inputs(config: Any) -> tuple[torch.Tensor, TextConditioning]:
    """A latent of 16 x 16 pixels and embeddings of one prompt of 8 tokens, random."""
    generator = torch.Generator().manual_seed(0)
    t5_width, llama_width = config.caption_channels
    conditioning = TextConditioning(
        t5=torch.randn(1, 8, t5_width, generator=generator),
        llama=torch.randn(max(config.llama_layers) + 1, 1, 8, llama_width, generator=generator),
        pooled=torch.randn(1, config.text_emb_dim, generator=generator),
    )
    return torch.randn(1, config.in_channels, 16, 16, generator=generator), conditioning


def main() -> None:
    """Write the table of the checkpoint that the command line names, line by line as it is measured."""
    parser = argparse.ArgumentParser(prog="python -m reverie_hidream.precision_report", description=report.__doc__)
    parser.add_argument("checkpoint", type=Path, help="directory of a checkpoint with transformer/")
    parser.add_argument("--out", type=Path, help="file for the table, besides the terminal")
    arguments = parser.parse_args()
    lines = []
    for line in report(arguments.checkpoint):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        lines.append(line)
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
