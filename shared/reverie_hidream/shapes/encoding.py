"""Captions to embeddings with a gradient: what `reverie_hidream.text` computes from the checkpoint, for training.

CLIP's captions are padded to the longest of the batch: the pooled token comes before the padding and does not see it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.shapes.architecture import NUM_TOKENS, build_tokenizers


def encode_captions(encoders: Mapping[str, Any], captions: Sequence[str], *, device: str = "cpu") -> TextConditioning:
    """Embeddings of a batch of captions, in the dtype of the encoders.

    Args:
        encoders: the four of `build_encoders`, on the device.
    """
    pooled = [encoders[name](_tokens(name, captions, device)["input_ids"]).text_embeds for name in ("clip_l", "clip_g")]
    t5_tokens, llama_tokens = _tokens("t5", captions, device), _tokens("llama", captions, device)
    t5 = encoders["t5"](t5_tokens["input_ids"], attention_mask=t5_tokens["attention_mask"]).last_hidden_state
    states = encoders["llama"].model(
        llama_tokens["input_ids"],
        attention_mask=llama_tokens["attention_mask"],
        output_hidden_states=True,
        use_cache=False,
    )
    return TextConditioning(t5=t5, llama=torch.stack(states.hidden_states[1:]), pooled=torch.cat(pooled, dim=-1))


def _tokens(name: str, captions: Sequence[str], device: str) -> Any:
    tokenizer: Any = build_tokenizers()[name]
    padding = "longest" if name.startswith("clip") else "max_length"
    tokens = tokenizer(
        list(captions), padding=padding, max_length=NUM_TOKENS if padding == "max_length" else 128, truncation=True,
        return_tensors="pt",
    )  # fmt: skip
    return tokens.to(device)
