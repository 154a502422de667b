"""Joint attention over image and text tokens, with folded padding (spec 1.5, design 7)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from reverie_hidream.pad_folding import AttentionPlan, rotate


def joint_attention(
    attention: nn.Module, image: torch.Tensor, text: torch.Tensor, plan: AttentionPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a double-stream block: both streams attend to both.

    Args:
        attention: diffusers' `HiDreamAttention` with text projections.
        image: (B, S, D).
        text: (B, T, D).
    """
    module: Any = attention
    query = torch.cat([module.q_rms_norm(module.to_q(image)), module.q_rms_norm_t(module.to_q_t(text))], dim=1)
    key = torch.cat([module.k_rms_norm(module.to_k(image)), module.k_rms_norm_t(module.to_k_t(text))], dim=1)
    value = torch.cat([module.to_v(image), module.to_v_t(text)], dim=1)
    mixed = _attend(query.to(image.dtype), key.to(image.dtype), value, module.heads, plan)
    image_part, text_part = mixed.split([image.shape[1], text.shape[1]], dim=1)
    return module.to_out(image_part), module.to_out_t(text_part)


def self_attention(attention: nn.Module, hidden: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """Attention of a single-stream block, where image and text are one sequence. (B, S + T, D)"""
    module: Any = attention
    query = module.q_rms_norm(module.to_q(hidden)).to(hidden.dtype)
    key = module.k_rms_norm(module.to_k(hidden)).to(hidden.dtype)
    mixed = _attend(query, key, module.to_v(hidden), module.heads, plan)
    output: torch.Tensor = module.to_out(mixed)
    return output


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_heads: int, plan: AttentionPlan
) -> torch.Tensor:
    query, key, value = (x.unflatten(-1, (num_heads, -1)) for x in (query, key, value))
    query = rotate(query, plan.query_rotation)
    key = rotate(key, plan.key_rotation)
    mixed = functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=plan.bias
    )
    return mixed.transpose(1, 2).flatten(2)
