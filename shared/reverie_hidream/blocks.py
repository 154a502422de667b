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
from reverie_hidream.moe import RouterUse, moe_forward, watched_moe_forward
from reverie_hidream.pad_folding import AttentionPlan

_EPSILON = 1e-6


def double_block(
    block: nn.Module,
    image: torch.Tensor,
    text: torch.Tensor,
    conditioning: torch.Tensor,
    plan: AttentionPlan,
    token_counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, RouterUse | None]:
    """One double-stream block: image, text, and how the router spread the image tokens if that is asked for.

    Args:
        block: diffusers' `HiDreamImageTransformerBlock`.
        image: (B, S, D). text: (B, T, D). conditioning: (B, D), of time and pooled text.
        token_counts: (S,) to watch the router.
    """
    module: Any = block
    parts = module.adaLN_modulation(conditioning)[:, None].chunk(12, dim=-1)
    for_image, for_text = parts[:6], parts[6:]
    attended_image, attended_text = joint_attention(
        module.attn1, _modulated(image, *for_image[:2]), _modulated(text, *for_text[:2]), plan
    )
    image = torch.addcmul(image, for_image[2], attended_image)
    text = torch.addcmul(text, for_text[2], attended_text)
    fed, use = _feed_forward(module.ff_i, _modulated(image, *for_image[3:5]), token_counts)
    image = torch.addcmul(image, for_image[5], fed)
    text = torch.addcmul(text, for_text[5], module.ff_t(_modulated(text, *for_text[3:5])))
    return image, text, use


def single_block(
    block: nn.Module,
    hidden: torch.Tensor,
    conditioning: torch.Tensor,
    plan: AttentionPlan,
    token_counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, RouterUse | None]:
    """One single-stream block: the tokens, and how the router spread them if that is asked for.

    Args:
        block: diffusers' `HiDreamImageSingleTransformerBlock`.
        hidden: (B, S + T, D), image then text. conditioning: (B, D).
        token_counts: (S + T,) to watch the router.
    """
    module: Any = block
    parts = module.adaLN_modulation(conditioning)[:, None].chunk(6, dim=-1)
    hidden = torch.addcmul(hidden, parts[2], self_attention(module.attn1, _modulated(hidden, *parts[:2]), plan))
    fed, use = _feed_forward(module.ff_i, _modulated(hidden, *parts[3:5]), token_counts)
    return torch.addcmul(hidden, parts[5], fed), use


def final_layer(layer: nn.Module, hidden: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
    """(B, S, D) to (B, S, patch * patch * C). `layer`: diffusers' `HiDreamImageOutEmbed`."""
    module: Any = layer
    shift, scale = module.adaLN_modulation(conditioning)[:, None].chunk(2, dim=-1)
    output: torch.Tensor = module.linear(_modulated(hidden, shift, scale))
    return output


def _modulated(hidden: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    normalised = functional.layer_norm(hidden, hidden.shape[-1:], eps=_EPSILON)
    return torch.addcmul(shift, normalised, 1 + scale)


def _feed_forward(
    feed_forward: nn.Module, hidden: torch.Tensor, token_counts: torch.Tensor | None
) -> tuple[torch.Tensor, RouterUse | None]:
    # A configuration with no routed experts has a plain feed-forward here.
    if not hasattr(feed_forward, "experts"):
        return feed_forward(hidden), None
    if token_counts is None:
        return moe_forward(feed_forward, hidden), None
    return watched_moe_forward(feed_forward, hidden, token_counts)
