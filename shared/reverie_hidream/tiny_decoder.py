"""The tiny decoder: scaled latents to small, quick pictures that are only looked at (spec 7.5).

diffusers' AutoencoderTiny, for instance `madebyollin/taef1`, which decodes the latents of the Flux VAE. It takes scaled
latents as they are.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from reverie_common.errors import InvalidArgumentError, NotFoundError
from reverie_common.storage.keys import content_digest
from torch.nn.functional import avg_pool2d

from reverie_hidream.fingerprints import files_fingerprint

PART = "vae_preview"
"""Folder of a checkpoint that holds one; the released checkpoints have none."""

HUB_ID = "madebyollin/taef1"
"""The tiny decoder of the Flux VAE, which is HiDream's."""

MAX_SIDE_PIXELS = 512
"""Longer edge of a preview at most."""

CODE_VERSION = "preview-1"
"""Change it with anything that changes a preview for the same weights and latents."""


def decoder_directory(directory: Path) -> Path:
    """Where the decoder is below a directory: in `vae_preview/` of a checkpoint, else in the directory itself.

    Raises:
        NotFoundError: there is none; the message has the remedy.
    """
    nested = directory / PART
    found = nested if nested.is_dir() else directory
    if not (found / "config.json").is_file() or not any(found.glob("*.safetensors")):
        raise NotFoundError(
            f"{directory} holds no tiny decoder: neither {PART}/ nor the folder itself has config.json and "
            f"*.safetensors; give the folder of an AutoencoderTiny, or {HUB_ID}",
            reason="PREVIEW_DECODER_NOT_FOUND",
            metadata={"directory": str(directory)},
        )
    return found


def decoder_fingerprint(directory: Path) -> str:
    """Hex sha256 over everything that a preview depends on besides the latents, of what `decoder_directory` found."""
    return content_digest({"weights": files_fingerprint([directory]), "code": CODE_VERSION})


def load_tiny_decoder(
    directory: Path, *, latent_channels: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> "TinyDecoder":
    """Load the decoder that `decoder_directory` found, frozen.

    Raises:
        InvalidArgumentError: it decodes latents of another number of channels.
    """
    model = AutoencoderTiny.from_pretrained(directory, dtype=dtype, use_safetensors=True, local_files_only=True)
    if model.config.latent_channels != latent_channels:
        raise InvalidArgumentError(
            f"the tiny decoder in {directory} decodes {model.config.latent_channels} channels, the VAE has "
            f"{latent_channels}; use the tiny decoder that belongs to this VAE: {HUB_ID} for HiDream's",
            reason="PREVIEW_DECODER_UNFIT",
        )
    model.requires_grad_(False).eval().to(device)
    return TinyDecoder(
        model=model, device=torch.device(device), dtype=dtype, fingerprint=decoder_fingerprint(directory)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyDecoder:
    """A loaded tiny decoder. Not thread-safe: one thread owns it."""

    model: AutoencoderTiny
    device: torch.device
    dtype: torch.dtype
    fingerprint: str

    def decode(self, latents: torch.Tensor, *, max_side: int = MAX_SIDE_PIXELS) -> torch.Tensor:
        """Decode scaled latents (B, C, h, w) into pictures (B, H, W, 3) uint8 on the CPU. Blocks.

        H and W are 8 h and 8 w, halved until neither is above `max_side`; the halves are means of 2 x 2 pixels.
        """
        with torch.inference_mode():
            # The decoder gives -1 to 1, as the VAE does.
            images: torch.Tensor = self.model.decode(latents.to(self.device, self.dtype), return_dict=False)[0].float()
            images = (images / 2 + 0.5).clamp(0, 1)
            while max(images.shape[-2:]) > max_side and min(images.shape[-2:]) > 1:
                images = avg_pool2d(images, 2)
            levels = (images * 255).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).contiguous().cpu().clone()
