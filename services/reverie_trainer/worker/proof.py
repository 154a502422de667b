"""Proof that an exported adapter is the trained one: in a fresh model, it changes the output to the same.

Two things are measured: the velocity of one training batch at several noise levels, against that of the trained model;
and a picture, drawn in a few steps from fixed noise for a fixed prompt, against that of the base model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import diffusers
import torch
from reverie_hidream.adapters.files import load_adapter
from reverie_hidream.flow import noisy_latents, schedule_sigmas, timesteps_of
from reverie_hidream.training.batch import Batch
from reverie_hidream.transformer import predict_velocity

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Relative difference of two outputs that are equal, by the dtype of the computation."""

FILE_TOLERANCE = 0.02
"""The file holds bfloat16, three digits: its effect may differ by so much of itself."""

PROBE_SIGMAS = (0.25, 0.5, 0.75)
"""Noise levels of a probe besides the batch's own. The file is rounded, and where two experts are almost equal for a
token the rounding may choose another one, which moves that output by far more than itself. It does so here and there,
while a wrong file is wrong everywhere: so the closest output decides."""

NUM_PICTURE_STEPS = 4
"""Enough for the change to build up; the picture is not for people."""

_PICTURE_SHIFT = 3.0


class ExportRefutedError(Exception):
    """The exported file does not do what the trained adapter does."""


class NothingLearntError(ExportRefutedError):
    """The exported file changes nothing: the training was too short, or too gentle for the dtype of the computation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """What was measured."""

    change: float
    """How far the adapter moves the output, relative to the output."""
    difference: float
    """How far the output of the loaded file is from the trained model's, relative to it, where they are closest."""
    tolerance: float
    """What is rounding there."""
    picture_change: float
    """How far the loaded file moves the picture of a fixed prompt, relative to the base model's latents."""


@torch.no_grad()
def probe(transformer: diffusers.HiDreamImageTransformer2DModel, batch: Batch) -> torch.Tensor:
    """The model's outputs for one batch, noise level by noise level, on the CPU. (levels, B, C, h, w)"""
    device = transformer.x_embedder.proj.bias.device
    own = batch.draws.sigmas.to(device)
    clean, noise = batch.latents.to(device), batch.noise.to(device)
    outputs = []
    for sigmas in (own, *(torch.full_like(own, sigma) for sigma in PROBE_SIGMAS)):
        latents = noisy_latents(clean, noise, sigmas)
        outputs.append(predict_velocity(transformer, latents, timesteps_of(sigmas), batch.conditioning))
    return torch.stack(outputs).cpu()


@torch.no_grad()
def draw_probe(transformer: diffusers.HiDreamImageTransformer2DModel, batch: Batch) -> torch.Tensor:
    """The latents of a batch's prompts, drawn from its noise in a few Euler steps, on the CPU. (B, C, h, w)"""
    device = transformer.x_embedder.proj.bias.device
    latents = batch.noise.to(device)
    levels = torch.cat([schedule_sigmas(NUM_PICTURE_STEPS, _PICTURE_SHIFT), torch.zeros(1)]).to(device)
    for level, following in pairwise(levels):
        sigmas = level.expand(latents.shape[0])
        velocity = predict_velocity(transformer, latents, timesteps_of(sigmas), batch.conditioning)
        latents = latents + (following - level) * velocity
    return latents.cpu()


def prove_export(
    body: bytes,
    *,
    trained_output: torch.Tensor,
    load_base: Callable[[], diffusers.HiDreamImageTransformer2DModel],
    batch: Batch,
) -> Proof:
    """Load the file into a freshly loaded model and compare outputs. Blocks while the model is loaded.

    Args:
        body: the exported file.
        trained_output: what `probe` gave for the trained model and the same batch.

    Raises:
        ExportRefutedError: it changes nothing, or not to the same.
    """
    transformer = load_base()
    base_output, base_picture = probe(transformer, batch), draw_probe(transformer, batch)
    load_adapter(transformer, body)
    loaded_output, loaded_picture = probe(transformer, batch), draw_probe(transformer, batch)
    rounding = TOLERANCES[transformer.x_embedder.proj.bias.dtype]
    difference, tolerance = _closest(loaded_output, trained_output, base_output, rounding)
    proof = Proof(
        change=_relative(loaded_output - base_output, base_output),
        difference=difference,
        tolerance=tolerance,
        picture_change=_relative(loaded_picture - base_picture, base_picture),
    )
    _require(proof)
    return proof


def _closest(loaded: torch.Tensor, trained: torch.Tensor, base: torch.Tensor, rounding: float) -> tuple[float, float]:
    """(Difference, tolerance) of the sample and noise level at which the loaded output suits the trained one best."""
    found = []
    for one, other, without in zip(loaded.flatten(0, 1), trained.flatten(0, 1), base.flatten(0, 1), strict=True):
        tolerance = rounding + FILE_TOLERANCE * _relative(one - without, without)
        found.append((_relative(one - other, other), tolerance))
    return min(found, key=lambda pair: pair[0] / pair[1])


def _require(proof: Proof) -> None:
    if not (proof.change > 0 and proof.picture_change > 0):
        raise NothingLearntError(
            f"the exported adapter changes the model's output by {proof.change:.2e} and the picture of a fixed prompt "
            f"by {proof.picture_change:.2e}: it learnt nothing"
        )
    if not proof.difference <= proof.tolerance:
        raise ExportRefutedError(
            f"the exported adapter differs from the trained one by {proof.difference:.2e} of the output, "
            f"at most {proof.tolerance:.0e} is rounding"
        )


def _relative(difference: torch.Tensor, reference: torch.Tensor) -> float:
    return float(difference.norm() / reference.norm())
