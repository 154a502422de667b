"""What each text encoder needs of the memory where it runs, counted from its configuration file (spec 1.2)."""

from collections.abc import Callable, Mapping
from typing import Any

from reverie.training.v1 import job_pb2
from reverie_hidream.precisions import NO_CHANGE, PRECISIONS

ENCODER_PARTS: Mapping[str, str] = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5": "text_encoder_3",
    "llama": "text_encoder_4",
}
"""Folder of each encoder in a checkpoint."""

RELEASED_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "clip_l": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "projection_dim": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "max_position_embeddings": 248,
    },
    "clip_g": {
        "vocab_size": 49408,
        "hidden_size": 1280,
        "projection_dim": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "max_position_embeddings": 218,
    },
    "t5": {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    "llama": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
"""What counts where a checkpoint has no such part: the released one lacks Llama."""

_DTYPE_BYTES = {"BF16": 2, "F32": 4}


class _Counter:
    """Numbers in the weights of Linears, which precisions change, and in all others."""

    def __init__(self) -> None:
        self.linear = 0
        self.plain = 0

    def add_linear(self, num_inputs: int, num_outputs: int, *, bias: bool = False) -> None:
        self.linear += num_inputs * num_outputs
        self.plain += num_outputs * bias


def encoder_memory(
    configs: Mapping[str, Mapping[str, Any]], precisions: Mapping[str, str], dtypes: Mapping[str, str]
) -> list[job_pb2.EstimatePart]:
    """Return the bytes of each encoder's weights.

    Args:
        configs: parsed `config.json` by encoder; released ones where one is missing.
        precisions: by encoder, as its service says; no_change where it says nothing.
        dtypes: safetensors dtype of the weights that are not quantised, by encoder; BF16 where nothing is said.
    """
    parts = []
    for name in ENCODER_PARTS:
        precision = precisions.get(name, NO_CHANGE)
        linear, plain = count_parameters(name, configs.get(name) or RELEASED_CONFIGS[name])
        plain_bytes = _DTYPE_BYTES.get(dtypes.get(name, "BF16"), 2)
        is_plain = precision == NO_CHANGE or precision not in PRECISIONS
        linear_bytes = plain_bytes if is_plain else PRECISIONS[precision].bits / 8
        size_bytes = int(linear * linear_bytes + plain * plain_bytes)
        parts.append(job_pb2.EstimatePart(name=f"{name} ({precision})", size_bytes=size_bytes))
    return parts


def count_parameters(name: str, config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers in the weights of an encoder's Linears, and all others, as the encoder service holds it.

    Raises:
        ValueError: the configuration lacks a key.
    """
    counter = _Counter()
    try:
        _COUNTERS[name](counter, config)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{ENCODER_PARTS[name]}/config.json: {error!r}") from error
    return counter.linear, counter.plain


def _count_clip(counter: _Counter, config: Mapping[str, Any]) -> None:
    width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    for _ in range(int(config["num_hidden_layers"])):
        for _ in range(4):
            counter.add_linear(width, width, bias=True)
        counter.add_linear(width, inner, bias=True)
        counter.add_linear(inner, width, bias=True)
        counter.plain += 4 * width
    counter.add_linear(width, int(config["projection_dim"]))
    counter.plain += (int(config["vocab_size"]) + int(config["max_position_embeddings"]) + 2) * width


def _count_t5(counter: _Counter, config: Mapping[str, Any]) -> None:
    width, inner = int(config["d_model"]), int(config["d_ff"])
    heads = int(config["num_heads"])
    attended = heads * int(config["d_kv"])
    for _ in range(int(config["num_layers"])):
        for _ in range(3):
            counter.add_linear(width, attended)
        counter.add_linear(attended, width)
        # The gate, the values, and back.
        counter.linear += 3 * width * inner
        counter.plain += 2 * width
    counter.plain += int(config["vocab_size"]) * width + width
    counter.plain += int(config.get("relative_attention_num_buckets", 32)) * heads


def _count_llama(counter: _Counter, config: Mapping[str, Any]) -> None:
    """Without the head, which would turn positions into logits that nobody reads."""
    width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    heads = int(config["num_attention_heads"])
    head_width = int(config.get("head_dim") or width // heads)
    keys = int(config.get("num_key_value_heads") or heads) * head_width
    for _ in range(int(config["num_hidden_layers"])):
        counter.linear += 2 * width * heads * head_width + 2 * width * keys + 3 * width * inner
        counter.plain += 2 * width
    counter.plain += int(config["vocab_size"]) * width + width


_COUNTERS: Mapping[str, Callable[[_Counter, Mapping[str, Any]], None]] = {
    "clip_l": _count_clip,
    "clip_g": _count_clip,
    "t5": _count_t5,
    "llama": _count_llama,
}
