"""Which tokens an image has, and the exact folding of its padding into one token (design 7, spec 1.6).

Every implementation pads a non-square latent with zeros to the model's 4096 tokens and multiplies the keys of the
padding by 0. So all pad tokens of a sample are the same in every layer: same zero input, same position (0, 0, 0), same
attention. N of them weigh in a softmax as one of them does with log N added to its logit. We carry that one, or a few
that share the weight where a device's attention wants a bias in 16 bits and an aligned number of tokens.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from diffusers.models.transformers.transformer_hidream_image import HiDreamImageEmbedND


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLayout:
    """The image tokens of each sample: rows * columns real ones, then those that stand for the padding."""

    num_rows: int
    """Patches from top to bottom."""
    num_columns: int
    """Patches from left to right."""
    num_padding: int
    """Pad tokens of diffusers' sequence; 0 for square images."""
    num_pad_tokens: int
    """Tokens that stand for them: 0 without padding, else 1, or up to the alignment."""

    @property
    def num_real(self) -> int:
        """Tokens that are part of the image."""
        return self.num_rows * self.num_columns

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return self.num_real + self.num_pad_tokens


def lay_out(height: int, width: int, *, patch_size: int, max_tokens: int, alignment: int = 1) -> TokenLayout:
    """Tokens of a latent of `height` x `width`.

    Args:
        alignment: the number of tokens of a padded image is a multiple of this.

    Raises:
        ValueError: a side is not a multiple of the patch, or a non-square latent has more tokens than the canvas.
    """
    if height % patch_size or width % patch_size or height <= 0 or width <= 0:
        raise ValueError(f"latent size {height}x{width} is not a positive multiple of {patch_size} in both directions")
    rows, columns = height // patch_size, width // patch_size
    if rows == columns:
        return TokenLayout(num_rows=rows, num_columns=columns, num_padding=0, num_pad_tokens=0)
    if rows * columns > max_tokens:
        raise ValueError(
            f"a non-square latent of {height}x{width} has {rows * columns} patches, the canvas holds {max_tokens}; "
            "use a smaller or a square size"
        )
    num_padding = max_tokens - rows * columns
    num_pad_tokens = 1 + (-rows * columns - 1) % alignment if num_padding else 0
    return TokenLayout(num_rows=rows, num_columns=columns, num_padding=num_padding, num_pad_tokens=num_pad_tokens)


def patchify(latents: torch.Tensor, layout: TokenLayout, patch_size: int) -> torch.Tensor:
    """(B, C, h, w) to (B, tokens, patch * patch * C), channels fastest; pad tokens are zeros (spec 1.6)."""
    batch, channels = latents.shape[:2]
    patches = latents.reshape(batch, channels, layout.num_rows, patch_size, layout.num_columns, patch_size)
    tokens = patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, layout.num_real, -1)
    if layout.num_pad_tokens:
        tokens = torch.cat([tokens, tokens.new_zeros(batch, layout.num_pad_tokens, tokens.shape[-1])], dim=1)
    return tokens


def unpatchify(tokens: torch.Tensor, layout: TokenLayout, patch_size: int) -> torch.Tensor:
    """(B, tokens, patch * patch * C) back to (B, C, h, w), without the pad tokens."""
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
    """The same, and 0 at pad tokens: rotating their keys also multiplies them by 0."""
    bias: torch.Tensor | None
    """(1, 1, 1, S): exp of it sums to N over the pad tokens, 0 elsewhere; None without padding."""


def plan_attention(
    embedder: HiDreamImageEmbedND, layout: TokenLayout, num_text_tokens: int, like: torch.Tensor
) -> AttentionPlan:
    """Rotations and bias for `layout` followed by so many text tokens; plans of recent sizes are kept.

    Args:
        like: a tensor on the device and in the dtype of the computation. The CPU's attention takes a wider bias than
            its inputs; the fused kernels of other devices want the dtype of their inputs.
    """
    is_cpu = like.device.type == "cpu"
    bias_dtype = torch.promote_types(like.dtype, torch.float32) if is_cpu else like.dtype
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
        pads = slice(layout.num_real, layout.num_tokens)
        key_rotation[pads] = 0
        bias = torch.zeros(1, 1, 1, rotation.shape[0], dtype=bias_dtype, device=device)
        bias[..., pads] = pad_biases(layout.num_padding, layout.num_pad_tokens, bias_dtype).to(device)
        return AttentionPlan(query_rotation=rotation, key_rotation=key_rotation, bias=bias)


def pad_biases(num_padding: int, num_pad_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits (num_pad_tokens,) in `dtype` whose exponentials sum to `num_padding`.

    Rounded to bfloat16, log N alone is off by up to 3 % of N; each further token takes up most of what is left.
    """
    biases = torch.full((num_pad_tokens,), -math.inf, dtype=dtype)
    left = float(num_padding)
    for index in range(num_pad_tokens):
        if left < 1e-9 * num_padding:
            break
        bias = torch.tensor(math.log(left), dtype=torch.float64).to(dtype)
        if math.exp(bias) > left and index + 1 < num_pad_tokens:
            bias = torch.nextafter(bias, torch.tensor(-math.inf, dtype=dtype))
        biases[index] = bias
        left -= math.exp(bias)
    return biases


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
