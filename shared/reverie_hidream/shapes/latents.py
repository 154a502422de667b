"""Latents of many scenes, encoded once before the transformer is trained: a file for each size of picture."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from reverie_hidream.shapes.architecture import SCALING_FACTOR, SHIFT_FACTOR
from reverie_hidream.shapes.drawing import draw_scene
from reverie_hidream.shapes.state import read_tensors, write_tensors
from reverie_hidream.shapes.train_vae import to_pixels
from reverie_hidream.shapes.world import PICTURE_SIZES, World

_ENCODED_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentPool:
    """Moments of the latents of scenes 0, 1, ... of every size."""

    moments: Mapping[tuple[int, int], torch.Tensor]
    """By (width, height): (N, 2, C, h, w) float32, scaled: means at [:, 0], deviations at [:, 1]."""

    def summary(self) -> tuple[float, float]:
        """Mean and deviation of all latents."""
        values = torch.cat([moments[:, 0].flatten() for moments in self.moments.values()])
        noise = torch.cat([moments[:, 1].flatten() for moments in self.moments.values()])
        return float(values.mean()), float((values.var() + noise.square().mean()).sqrt())


def prepare_latents(
    directory: Path, vae: AutoencoderKL, *, seed: int, num_scenes: int, run: Mapping[str, Any], device: str = "cpu"
) -> LatentPool:
    """Encode the scenes that are not encoded yet, shown on stderr. Blocks.

    Args:
        num_scenes: of all sizes together; each has its share of PICTURE_SIZES, at least one.
        run: what the latents depend on; files of another run are written again.
    """
    total = sum(PICTURE_SIZES.values())
    moments = {}
    for size, weight in PICTURE_SIZES.items():
        count = max(1, num_scenes * weight // total)
        path = directory / f"latents-{size[0]}x{size[1]}.safetensors"
        header = {"run": dict(run), "count": count}
        kept = _read(path, header)
        if kept is None:
            kept = _encode(vae.to(device), World(seed=seed, picture_size=size), count, device)
            write_tensors(path, {"moments": kept}, header)
        moments[size] = kept
    return LatentPool(moments=moments)


def encode_pixels(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Moments of scaled latents, (B, 2, C, h, w) float32, of pixels (B, 3, H, W) in -1 to 1."""
    posterior: DiagonalGaussianDistribution = vae.encode(pixels).latent_dist
    mean = (posterior.mean - SHIFT_FACTOR) * SCALING_FACTOR
    return torch.stack([mean, posterior.std * SCALING_FACTOR], dim=1)


def _read(path: Path, header: Mapping[str, Any]) -> torch.Tensor | None:
    if not path.is_file():
        return None
    tensors, written = read_tensors(path)
    return tensors["moments"] if written == header else None


@torch.no_grad()
def _encode(vae: AutoencoderKL, world: World, count: int, device: str) -> torch.Tensor:
    parts = []
    for start in range(0, count, _ENCODED_AT_ONCE):
        indices = range(start, min(start + _ENCODED_AT_ONCE, count))
        pixels = to_pixels([draw_scene(world.training_scene(index)) for index in indices])
        parts.append(encode_pixels(vae, pixels.to(device)).cpu())
        sys.stderr.write(f"\rlatents of {world.picture_size}: {indices.stop}/{count}")
        sys.stderr.flush()
    sys.stderr.write("\n")
    return torch.cat(parts)
