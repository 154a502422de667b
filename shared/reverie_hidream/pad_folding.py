"""Which tokens an image has, and the exact folding of its padding into one token (design 7, spec 1.6).

Every implementation pads a non-square latent with zeros to the model's 4096 tokens and multiplies the keys of the
padding by 0. So all pad tokens of a sample are the same in every layer: same zero input, same position (0, 0, 0), same
attention. N of them weigh in a softmax as one of them does with log N added to its logit. We carry that one.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from diffusers.models.transformers.transformer_hidream_image import HiDreamImageEmbedND


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLayout:
    """The image tokens of each sample: rows * columns real ones, then one for the padding if there is any."""

    num_rows: int
    """Patches from top to bottom."""
    num_columns: int
    """Patches from left to right."""
    num_padding: int
    """Pad tokens that the one stands for; 0 for square images."""

    @property
    def num_real(self) -> int:
        """Tokens that are part of the image."""
        return self.num_rows * self.num_columns

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return self.num_real + (1 if self.num_padding else 0)


def lay_out(height: int, width: int, *, patch_size: int, max_tokens: int) -> TokenLayout:
    """Tokens of a latent of `height` x `width`.

    Raises:
        ValueError: a side is not a multiple of the patch, or a non-square latent has more tokens than the canvas.
    """
    if height % patch_size or width % patch_size or height <= 0 or width <= 0:
        raise ValueError(f"latent size {height}x{width} is not a positive multiple of {patch_size} in both directions")
    rows, columns = height // patch_size, width // patch_size
    if rows == columns:
        return TokenLayout(num_rows=rows, num_columns=columns, num_padding=0)
    if rows * columns > max_tokens:
        raise ValueError(
            f"a non-square latent of {height}x{width} has {rows * columns} patches, the canvas holds {max_tokens}; "
            "use a smaller or a square size"
        )
    return TokenLayout(num_rows=rows, num_columns=columns, num_padding=max_tokens - rows * columns)


def patchify(latents: torch.Tensor, layout: TokenLayout, patch_size: int) -> torch.Tensor:
    """(B, C, h, w) to (B, tokens, patch * patch * C), channels fastest; the pad token is zeros (spec 1.6)."""
    batch, channels = latents.shape[:2]
    patches = latents.reshape(batch, channels, layout.num_rows, patch_size, layout.num_columns, patch_size)
    tokens = patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, layout.num_real, -1)
    if layout.num_padding:
        tokens = torch.cat([tokens, tokens.new_zeros(batch, 1, tokens.shape[-1])], dim=1)
    return tokens


def unpatchify(tokens: torch.Tensor, layout: TokenLayout, patch_size: int) -> torch.Tensor:
    """(B, tokens, patch * patch * C) back to (B, C, h, w), without the pad token."""
    batch = tokens.shape[0]
    patches = tokens[:, : layout.num_real].reshape(
        batch, layout.num_rows, layout.num_columns, patch_size, patch_size, -1
    )
    height, width = layout.num_rows * patch_size, layout.num_columns * patch_size
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """What every attention of one forward pass needs to know about positions and padding; S tokens, image then text."""

    query_rotation: torch.Tensor
    """(S, 1, R) complex64: rotation of each pair of features."""
    key_rotation: torch.Tensor
    """The same, and 0 at the pad token: rotating its key also multiplies it by 0."""
    bias: torch.Tensor | None
    """(1, 1, 1, S) float32 or float64: log N at the pad token, 0 elsewhere; None without padding."""


def plan_attention(
    embedder: HiDreamImageEmbedND, layout: TokenLayout, num_text_tokens: int, like: torch.Tensor
) -> AttentionPlan:
    """Rotations and bias for `layout` followed by so many text tokens; plans of recent sizes are kept.

    Args:
        like: a tensor on the device and in the dtype of the computation. In bfloat16 log N would be off by 1 %, so the
            bias is never narrower than float32.
    """
    bias_dtype = torch.promote_types(like.dtype, torch.float32)
    return _plan_attention(
        tuple(embedder.axes_dim), float(embedder.theta), layout, num_text_tokens, like.device, bias_dtype
    )


# 64 sizes of at most 5 MB; a job has a handful of buckets.
@functools.lru_cache(maxsize=64)
def _plan_attention(
    axes: tuple[int, ...],
    theta: float,
    layout: TokenLayout,
    num_text_tokens: int,
    device: torch.device,
    bias_dtype: torch.dtype,
) -> AttentionPlan:
    with torch.inference_mode(False), torch.no_grad():
        rotation = _rotations(axes, theta, layout, num_text_tokens, device)
        if not layout.num_padding:
            return AttentionPlan(query_rotation=rotation, key_rotation=rotation, bias=None)
        key_rotation = rotation.clone()
        key_rotation[layout.num_real] = 0
        bias = torch.zeros(1, 1, 1, rotation.shape[0], dtype=bias_dtype, device=device)
        bias[..., layout.num_real] = math.log(layout.num_padding)
        return AttentionPlan(query_rotation=rotation, key_rotation=key_rotation, bias=bias)


def _rotations(
    axes: tuple[int, ...], theta: float, layout: TokenLayout, num_text_tokens: int, device: torch.device
) -> torch.Tensor:
    ids = torch.zeros(1, layout.num_tokens + num_text_tokens, 3, device=device)
    grid = ids[0, : layout.num_real].view(layout.num_rows, layout.num_columns, 3)
    grid[..., 1] = torch.arange(layout.num_rows, device=device)[:, None]
    grid[..., 2] = torch.arange(layout.num_columns, device=device)[None, :]
    matrices = HiDreamImageEmbedND(theta=theta, axes_dim=list(axes))(ids)[0]
    # (S, 1, R, 2, 2) rotation matrices [[cos, -sin], [sin, cos]].
    return torch.complex(matrices[..., 0, 0].contiguous(), matrices[..., 1, 0].contiguous())


def rotate(features: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of features in float32, as the released model was trained (spec 1.5).

    One complex product gives the bits of diffusers' formula in a ninth of its time.

    Args:
        features: (B, S, heads, head_dim).
        rotation: (S, 1, R) complex64; the first 2 * R features are rotated, the others stay.
    """
    num_rotated = 2 * rotation.shape[-1]
    if num_rotated < features.shape[-1]:
        rotated, rest = features[..., :num_rotated], features[..., num_rotated:]
        return torch.cat([rotate(rotated, rotation), rest], dim=-1)
    pairs = torch.view_as_complex(features.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(features.dtype)
