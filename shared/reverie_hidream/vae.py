"""HiDream's VAE: pixels to the posterior of scaled latents, scaled latents to pixels (spec 1.3).

Latents are scaled wherever they leave this module: (z - shift_factor) * scaling_factor.
Shapes: B images, C latent channels, H x W pixels, h x w = H/8 x W/8.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from reverie_common.storage.keys import content_digest

from reverie_hidream.checkpoint import component_fingerprint, require_parts

CODE_VERSION = "vae-1"
"""Change it with anything that changes a latent for the same weights and pixels."""

PART = "vae"
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def load_vae(checkpoint: Path, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> "Vae":
    """Load the VAE of a checkpoint, frozen, with tiling and slicing on.

    Raises:
        NotFoundError: the checkpoint has no vae/.
        ValueError: the dtype is float16, in which the Flux VAE overflows, or not a floating point type.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"the VAE cannot run in {dtype}; use one of {', '.join(map(str, _DTYPES))}")
    require_parts(checkpoint, [PART])
    model = AutoencoderKL.from_pretrained(checkpoint / PART, dtype=dtype, use_safetensors=True, local_files_only=True)
    model.requires_grad_(False).eval().to(device)
    model.enable_tiling()
    model.enable_slicing()
    return Vae(model=model, device=torch.device(device), dtype=dtype, fingerprint=_fingerprint(checkpoint, dtype))


@dataclass(frozen=True, kw_only=True, slots=True)
class Vae:
    """A loaded VAE. Not thread-safe: one thread owns it."""

    model: AutoencoderKL
    device: torch.device
    dtype: torch.dtype

    fingerprint: str
    """Hex sha256 over everything that a latent depends on besides the pixels."""

    @property
    def scaling_factor(self) -> float:
        """What a shifted latent is multiplied by: 0.3611."""
        return float(self.model.config.scaling_factor)

    @property
    def shift_factor(self) -> float:
        """What is taken from a latent before scaling: 0.1159."""
        return float(self.model.config.shift_factor or 0.0)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent: 16."""
        return int(self.model.config.latent_channels)

    @property
    def downsampling(self) -> int:
        """Pixels per latent pixel in each direction: 8."""
        return int(2 ** (len(self.model.config.block_out_channels) - 1))

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode images into the mean and the standard deviation of their scaled latents. Blocks.

        An image's result does not depend on the others of its batch: slicing takes them one by one.

        Args:
            pixels: (B, 3, H, W) floating point in [-1, 1]; H and W multiples of `downsampling`.

        Returns:
            (B, 2, C, h, w) float32 on the CPU (float64 for a float64 VAE): means at [:, 0], deviations at [:, 1].

        Raises:
            ValueError: the shape does not fit.
        """
        self._check_pixels(pixels)
        with torch.inference_mode():
            encoded = self.model.encode(pixels.to(self.device, self.dtype)).latent_dist.parameters
            # Before the exponential: bfloat16 has three digits.
            posterior = DiagonalGaussianDistribution(encoded.to(torch.promote_types(self.dtype, torch.float32)))
            mean = (posterior.mean - self.shift_factor) * self.scaling_factor
            moments = torch.stack([mean, posterior.std * self.scaling_factor], dim=1).cpu()
        # A clone can take part in autograd, which an inference tensor cannot.
        return moments.clone()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents (B, C, h, w) into pictures. Blocks.

        Returns:
            (B, H, W, 3) uint8 on the CPU.

        Raises:
            ValueError: the shape does not fit.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents of shape {tuple(latents.shape)} are not (B, {self.latent_channels}, h, w)")
        with torch.inference_mode():
            unscaled = latents.to(self.device, self.dtype) / self.scaling_factor + self.shift_factor
            images: torch.Tensor = self.model.decode(unscaled, return_dict=False)[0].float()
            levels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).contiguous().cpu().clone()

    def _check_pixels(self, pixels: torch.Tensor) -> None:
        step = self.downsampling
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % step or pixels.shape[3] % step:
            raise ValueError(
                f"pixels of shape {tuple(pixels.shape)} are not (B, 3, H, W) with H and W multiples of {step}"
            )


def _fingerprint(checkpoint: Path, dtype: torch.dtype) -> str:
    record = {"weights": component_fingerprint(checkpoint, [PART]), "dtype": str(dtype), "code": CODE_VERSION}
    return content_digest(record)
