"""HiDream's four text encoders: exactly the embeddings of spec 1.2, one prompt at a time.

| name   | output of one prompt                                             |
|--------|------------------------------------------------------------------|
| clip_l | [768] pooled projection                                          |
| clip_g | [1280] pooled projection                                         |
| t5     | [128, 4096] last hidden state, padding masked inside the encoder |
| llama  | [32, 128, 4096] hidden states after blocks 1..32                 |

The transformer attends to padded positions, so what they hold matters: every prompt is padded to `max_length`.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from reverie_common.storage.keys import JSON, content_digest
from transformers import (
    BatchEncoding,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5EncoderModel,
    T5Tokenizer,
)

from reverie_hidream.checkpoint import component_directory, progress_bars_disabled
from reverie_hidream.fingerprints import files_fingerprint
from reverie_hidream.quantise import check_precision, quantise

CODE_VERSION = "text-1"
"""Change it with anything that changes an embedding for the same weights and prompt."""

MAX_LENGTH = 128
"""Tokens that reach a model, special tokens included, as in the released training and pipelines."""

CLIP_POSITIONS = 218
"""The shorter of the two CLIPs' position tables; diffusers applies it to both."""

ENCODER_NAMES = ("clip_l", "clip_g", "t5", "llama")


def load_text_encoder(
    checkpoint: Path,
    name: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    precision: str = "no_change",
) -> "TextEncoder":
    """Load one text encoder with its tokenizer, frozen.

    Args:
        checkpoint: a resolved checkpoint. For "llama" also a plain Llama repository, or what `resolve_llama` returns.
        name: one of ENCODER_NAMES.
        dtype: of activations and embeddings, and of weights that are not quantised.
        precision: one of `quantise.PRECISIONS`.

    Raises:
        NotFoundError: a part is missing; the message names it and the remedy.
        ValueError: the name or the precision is unknown.
    """
    if name not in _KINDS:
        raise ValueError(f"text encoder {name!r} is not known; use one of {', '.join(ENCODER_NAMES)}")
    check_precision(precision, device=device)
    kind = _KINDS[name]
    directories = [component_directory(checkpoint, part) for part in (kind.model_part, kind.tokenizer_part)]
    model, tokenizer = _load(kind, *directories, dtype=dtype)
    quantise(model, precision)
    max_length = kind.max_length(model.config, tokenizer)
    record: dict[str, JSON] = {
        "files": files_fingerprint(directories),
        "precision": precision,
        "dtype": str(dtype),
        "max_length": max_length,
        "code": CODE_VERSION,
    }
    return TextEncoder(
        name=name,
        device=torch.device(device),
        dtype=dtype,
        precision=precision,
        max_length=max_length,
        shape=kind.shape(model.config, max_length),
        fingerprint=content_digest(record),
        _tokenizer=tokenizer,
        _model=model.eval().to(device),
        _forward=kind.forward,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedText:
    """What one encoder made of one prompt."""

    tensor: torch.Tensor
    """On the CPU, without a batch axis; shape and dtype are the encoder's."""

    num_tokens: int
    """Tokens of the whole prompt, special tokens included, before any cut."""

    dropped_text: str
    """The end of the prompt that did not fit into `max_length`; empty when all of it fitted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoder:
    """A loaded text encoder. `encode` is for one thread at a time, `measure` for any, also meanwhile."""

    name: str
    device: torch.device
    dtype: torch.dtype
    precision: str

    max_length: int
    """Tokens that reach the model."""

    shape: tuple[int, ...]
    """Of one prompt's embedding."""

    fingerprint: str
    """Hex sha256 over everything that an embedding depends on besides the prompt."""

    _tokenizer: PreTrainedTokenizerBase
    _model: Any
    _forward: Callable[[Any, BatchEncoding], torch.Tensor]

    _tokenizer_lock: threading.Lock = field(default_factory=threading.Lock)
    """A tokenizer keeps padding and truncation as state, which calls of two threads would mix up."""

    @property
    def module(self) -> Any:
        """The model, frozen."""
        return self._model

    def encode(self, prompts: Sequence[str]) -> list[EncodedText]:
        """Encode prompts of any length, also the empty one. Blocks.

        A prompt's embedding does not depend on the others: on the CPU each goes through the model alone, since the
        blocking of a matrix product, and so its rounding, changes with the number of rows, and 128 rows keep a core
        busy. On an accelerator all prompts of the call are one batch.
        """
        groups = [prompts[i : i + 1] for i in range(len(prompts))] if self.device.type == "cpu" else [prompts]
        # Clones let go of the batch that they came from.
        tensors = [tensor.clone() for group in groups if group for tensor in self._embed(group)]
        return [self._with_cut(prompt, tensor) for prompt, tensor in zip(prompts, tensors, strict=True)]

    def measure(self, prompt: str) -> tuple[int, str]:
        """Count a prompt's tokens without running the model: `num_tokens` and `dropped_text` of EncodedText."""
        with self._tokenizer_lock:
            words = self._tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        num_special = self._tokenizer.num_special_tokens_to_add()
        num_tokens = len(words["input_ids"]) + num_special
        if num_tokens <= self.max_length:
            return num_tokens, ""
        first_cut = words["offset_mapping"][self.max_length - num_special][0]
        return num_tokens, prompt[first_cut:].lstrip()

    # Not inference_mode: quanto's 2- and 4-bit weights are unpacked by an autograd function, which it does not allow.
    @torch.no_grad()
    def _embed(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        with self._tokenizer_lock:
            tokens = self._tokenizer(
                list(prompts), padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
            )
        embeddings = self._forward(self._model, tokens.to(self.device)).to(self.dtype).cpu()
        return list(embeddings)

    def _with_cut(self, prompt: str, tensor: torch.Tensor) -> EncodedText:
        num_tokens, dropped_text = self.measure(prompt)
        return EncodedText(tensor=tensor, num_tokens=num_tokens, dropped_text=dropped_text)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """How one of the four is loaded and used."""

    model_part: str
    tokenizer_part: str
    model_class: Any
    tokenizer_class: Any
    forward: Callable[[Any, BatchEncoding], torch.Tensor]
    max_length: Callable[[Any, PreTrainedTokenizerBase], int]
    shape: Callable[[Any, int], tuple[int, ...]]


def _load(kind: _Kind, model_directory: Path, tokenizer_directory: Path, *, dtype: torch.dtype) -> tuple[Any, Any]:
    tokenizer = kind.tokenizer_class.from_pretrained(tokenizer_directory, local_files_only=True)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if kind.model_class is LlamaForCausalLM:
        # Llama has no pad token of its own, and copies of it on the Hub add different ones; HiDream was trained on eos.
        tokenizer.pad_token = tokenizer.eos_token
    with progress_bars_disabled():
        model = kind.model_class.from_pretrained(
            model_directory, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    # Its head would turn every position into logits that nobody reads.
    return (model.model if kind.model_class is LlamaForCausalLM else model), tokenizer


def _pooled(model: Any, tokens: BatchEncoding) -> torch.Tensor:
    # No attention mask, as in diffusers: it would change nothing, since attention is causal and the pooled token, the
    # first end token, comes before all padding.
    pooled: torch.Tensor = model(tokens["input_ids"]).text_embeds
    return pooled


def _last_hidden_state(model: Any, tokens: BatchEncoding) -> torch.Tensor:
    hidden: torch.Tensor = model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    return hidden


def _all_hidden_states(model: Any, tokens: BatchEncoding) -> torch.Tensor:
    outputs = model(
        tokens["input_ids"], attention_mask=tokens["attention_mask"], output_hidden_states=True, use_cache=False
    )
    # [0] is the embedding table's output, which HiDream does not read.
    return torch.stack(outputs.hidden_states[1:], dim=1)


def _clip(number: str) -> _Kind:
    return _Kind(
        model_part=f"text_encoder{number}",
        tokenizer_part=f"tokenizer{number}",
        model_class=CLIPTextModelWithProjection,
        tokenizer_class=CLIPTokenizer,
        forward=_pooled,
        max_length=lambda config, _: min(MAX_LENGTH, CLIP_POSITIONS, config.max_position_embeddings),
        shape=lambda config, _: (config.projection_dim,),
    )


_KINDS: Mapping[str, _Kind] = {
    "clip_l": _clip(""),
    "clip_g": _clip("_2"),
    "t5": _Kind(
        model_part="text_encoder_3",
        tokenizer_part="tokenizer_3",
        model_class=T5EncoderModel,
        tokenizer_class=T5Tokenizer,
        forward=_last_hidden_state,
        max_length=lambda _, tokenizer: min(MAX_LENGTH, tokenizer.model_max_length),
        shape=lambda config, length: (length, config.d_model),
    ),
    "llama": _Kind(
        model_part="text_encoder_4",
        tokenizer_part="tokenizer_4",
        model_class=LlamaForCausalLM,
        tokenizer_class=PreTrainedTokenizerFast,
        forward=_all_hidden_states,
        max_length=lambda _, tokenizer: min(MAX_LENGTH, tokenizer.model_max_length),
        shape=lambda config, length: (config.num_hidden_layers, length, config.hidden_size),
    ),
}
