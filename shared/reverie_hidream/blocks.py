"""The two kinds of transformer block and the final layer, over diffusers' modules (spec 1.5).

The modules stay diffusers' own, so names, weights and anything that replaces the forward of a Linear (quantisation,
adapters) hold; only what happens between the Linears is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from reverie_hidream.attention import joint_attention, self_attention
from reverie_hidream.moe import moe_forward
from reverie_hidream.pad_folding import AttentionPlan

_EPSILON = 1e-6


def double_block(
    block: nn.Module, image: torch.Tensor, text: torch.Tensor, conditioning: torch.Tensor, plan: AttentionPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """One double-stream block.

    Args:
        block: diffusers' `HiDreamImageTransformerBlock`.
        image: (B, S, D). text: (B, T, D). conditioning: (B, D), of time and pooled text.
    """
    module: Any = block
    parts = module.adaLN_modulation(conditioning)[:, None].chunk(12, dim=-1)
    for_image, for_text = parts[:6], parts[6:]
    attended_image, attended_text = joint_attention(
        module.attn1, _modulated(image, *for_image[:2]), _modulated(text, *for_text[:2]), plan
    )
    image = torch.addcmul(image, for_image[2], attended_image)
    text = torch.addcmul(text, for_text[2], attended_text)
    image = torch.addcmul(image, for_image[5], _feed_forward(module.ff_i, _modulated(image, *for_image[3:5])))
    text = torch.addcmul(text, for_text[5], module.ff_t(_modulated(text, *for_text[3:5])))
    return image, text


def single_block(
    block: nn.Module, hidden: torch.Tensor, conditioning: torch.Tensor, plan: AttentionPlan
) -> torch.Tensor:
    """One single-stream block.

    Args:
        block: diffusers' `HiDreamImageSingleTransformerBlock`.
        hidden: (B, S + T, D), image then text. conditioning: (B, D).
    """
    module: Any = block
    parts = module.adaLN_modulation(conditioning)[:, None].chunk(6, dim=-1)
    hidden = torch.addcmul(hidden, parts[2], self_attention(module.attn1, _modulated(hidden, *parts[:2]), plan))
    return torch.addcmul(hidden, parts[5], _feed_forward(module.ff_i, _modulated(hidden, *parts[3:5])))


def final_layer(layer: nn.Module, hidden: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
    """(B, S, D) to (B, S, patch * patch * C). `layer`: diffusers' `HiDreamImageOutEmbed`."""
    module: Any = layer
    shift, scale = module.adaLN_modulation(conditioning)[:, None].chunk(2, dim=-1)
    output: torch.Tensor = module.linear(_modulated(hidden, shift, scale))
    return output


def _modulated(hidden: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    normalised = functional.layer_norm(hidden, hidden.shape[-1:], eps=_EPSILON)
    return torch.addcmul(shift, normalised, 1 + scale)


def _feed_forward(feed_forward: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    # A configuration with no routed experts has a plain feed-forward here.
    if hasattr(feed_forward, "experts"):
        return moe_forward(feed_forward, hidden)
    output: torch.Tensor = feed_forward(hidden)
    return output
