"""Weights of the tiny checkpoint: each tensor is a pure function of the seed, the component and the tensor's name.

Drawn with NumPy's counter-based Philox, so the library's own initialisers, their order and the number of threads do
not matter. Scales keep activations and gradients of order one through every block, final layers included.
"""

import hashlib
import math

import numpy as np
import torch
from torch import nn

LOG_VARIANCE_CENTRE = -6.0
LATENT_DEVIATION = 2.77


@torch.no_grad()
def draw_weights(module: nn.Module, *, seed: int, component: str) -> None:
    """Fill every parameter of the module in place.

    Matrices and kernels are N(0, 1/fan_in), embeddings N(0, 0.5^2), norm weights near 1, biases near 0.
    """
    embeddings = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    for name, parameter in module.named_parameters():
        values = torch.from_numpy(_normal(f"{seed}/{component}/{name}", tuple(parameter.shape)))
        parameter.copy_(_scaled(values, name, is_embedding=id(parameter) in embeddings))


@torch.no_grad()
def shape_posterior(vae: nn.Module) -> None:
    """Make the encoder's posterior look like a trained one: latents of deviation about 2.8, narrow variance."""
    weight = vae.get_parameter("encoder.conv_out.weight")
    bias = vae.get_parameter("encoder.conv_out.bias")
    channels = len(bias) // 2
    weight[:channels] *= LATENT_DEVIATION
    weight[channels:] *= 0.1
    bias[channels:] += LOG_VARIANCE_CENTRE


def _normal(label: str, shape: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    key = int.from_bytes(hashlib.sha256(label.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)


def _scaled(values: torch.Tensor, name: str, *, is_embedding: bool) -> torch.Tensor:
    if is_embedding:
        return values * 0.5
    if values.ndim >= 2:
        return values / math.sqrt(values[0].numel())
    return values * 0.05 if name.endswith("bias") else 1.0 + values * 0.05
