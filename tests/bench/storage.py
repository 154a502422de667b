"""Embedding storage: rates of decoding and encoding, sizes, and the errors of `compact` on three kinds of data.

Real captions through the tiny checkpoint's encoders; normal numbers; and heavy-tailed numbers with what makes Llama's
hidden states hard: a few channels dozens of times the median, and a first token thousands of times the others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from reverie_common.storage import RawTensor, compress, decompress
from reverie_common.storage.int8_groups import decode, encode
from reverie_hidream.tensor_io import from_raw, to_raw
from reverie_hidream.text import load_text_encoder
from reverie_hidream.tiny import make_tiny_checkpoint
from reverie_hidream.tiny_tokenizers import corpus_lines

from tests.bench.report import Figure, interleaved, median_ratio

# Llama's hidden states of one caption on the released model: 33.6 MB.
_SHAPE = (32, 128, 4096)
_NUM_CAPTIONS = 16
_ROUNDS = 7


def measure() -> Iterator[Figure]:
    """Yield rates as ratios to the exact codec's, sizes as shares of bfloat16, and relative errors."""
    normal = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    yield from _rates(to_raw(normal))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_tiny_checkpoint(Path(folder) / "tiny")
        captions = corpus_lines()[:_NUM_CAPTIONS]
        for name in ("t5", "llama"):
            encoder = load_text_encoder(checkpoint, name)
            tensors = [encoded.tensor for encoded in encoder.encode(captions)]
            yield from _errors(f"{name} of the tiny checkpoint", tensors)
    yield from _errors("normal numbers", [normal])
    yield from _errors("heavy-tailed numbers", [heavy_tailed(normal)])


def heavy_tailed(normal: torch.Tensor) -> torch.Tensor:
    """Normal numbers with outlier channels and an outlier token. (L, T, W)"""
    values = normal.float().clone()
    channels = torch.randperm(values.shape[-1], generator=torch.Generator().manual_seed(1))[: values.shape[-1] // 200]
    values[..., channels] *= 100.0
    values[:, 0] *= 3000.0
    return values.bfloat16()


def _rates(raw: RawTensor) -> Iterator[Figure]:
    body = bytes(raw.data)
    packed, encoded = compress(body), encode(raw)
    exact, compact = interleaved(
        [lambda: decompress(packed), lambda: decode(encoded.values, encoded.scales, raw.dtype)], rounds=_ROUNDS
    )
    yield Figure(
        name="compact decode, rate against exact decode", value=median_ratio(exact, compact), unit="ratio", at_least=1.0
    )
    packing, encoding = interleaved([lambda: compress(body), lambda: encode(raw)], rounds=_ROUNDS)
    yield Figure(name="compact encode, rate against exact", value=median_ratio(packing, encoding), unit="ratio")
    yield Figure(name="exact, normal numbers, share of bfloat16", value=len(packed) / len(body), unit="share")
    size = len(encoded.values.data) + len(encoded.scales.data)
    yield Figure(name="compact, share of bfloat16", value=size / len(body), unit="share", at_most=0.54)


def _errors(data: str, tensors: Sequence[torch.Tensor]) -> Iterator[Figure]:
    """Over whole tensors, as jobs report it, and the median over tokens, which outlier tokens do not hide."""
    encoded = [encode(to_raw(tensor)) for tensor in tensors]
    whole = [each.relative_error for each in encoded]
    by_token = torch.cat(
        [
            _token_errors(tensor, from_raw(decode(each.values, each.scales, "BF16")))
            for tensor, each in zip(tensors, encoded, strict=True)
        ]
    )
    yield Figure(name=f"compact error, {data}, mean", value=100 * sum(whole) / len(whole), unit="%")
    yield Figure(name=f"compact error, {data}, max", value=100 * max(whole), unit="%", at_most=1.5)
    yield Figure(
        name=f"compact error, {data}, median token", value=100 * float(by_token.median()), unit="%", at_most=1.5
    )


def _token_errors(exact: torch.Tensor, restored: torch.Tensor) -> torch.Tensor:
    difference = torch.linalg.vector_norm(restored.double() - exact.double(), dim=-1)
    norm = torch.linalg.vector_norm(exact.double(), dim=-1)
    errors: torch.Tensor = (difference / norm)[norm > 0].flatten()
    return errors
