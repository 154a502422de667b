"""What a worker needs of its accelerator's memory, part by part, along the budget of spec 10.2.

What a block keeps for the backward pass is counted in values for each token. The counts are those that the saved
tensors of `reverie_hidream.blocks` add up to; a test holds the sum against torch's allocations on small models.
D is the width of the residual stream, H the inner width of a feed-forward, K the experts of a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reverie.training.v1 import job_pb2
from reverie_common.optimizer_catalogue import find_optimizer
from reverie_hidream.precisions import NO_CHANGE, PRECISIONS

from reverie_trainer.jobs.admission.adapter_selection import (
    AdapterSelection,
    ModuleNode,
    TransformerConfig,
    enumerate_modules,
    swiglu_width,
)
from reverie_trainer.jobs.spec import JobSpec
from reverie_trainer.jobs.spec.adapter import FullRank

TEXT_TOKENS = 384
"""Of every attention: T5, the last Llama layer, the block's own Llama layer, 128 each (spec 1.2)."""

# Normed, modulated, rotated, attended, gated: what one stream of a block keeps besides its feed-forward.
_IMAGE_WIDTHS = 13
_TEXT_WIDTHS = 11

# RMS norms keep queries and keys in float32, two values of bfloat16 each.
_NORM_WIDTHS = 2

# Both projections in, the activated one.
_SWIGLU_INNER_WIDTHS = 3

# An adapter on a feed-forward keeps the product that goes into its last Linear, and what lies between its factors.
_ADAPTED_SWIGLU_INNER_WIDTHS = 1
_ADAPTED_SWIGLU_WIDTHS = 5

# Gradients that the backward pass of a block holds besides what the forward pass kept.
_BACKWARD_WIDTHS = 5

# Latents, noise, prediction, target and the loss's own, in float32: 64 values each for a token.
_LATENT_BYTES_PER_TOKEN = 1100

# The accelerator's context and what is lost between tensors (spec 10.2).
_CONTEXT_BYTES = 700_000_000

_ATTENTION_LINEARS = ("to_q", "to_k", "to_v", "to_out")


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one forward pass sees."""

    num_samples: int
    image_tokens: int
    """Of one sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Adapted:
    """What part of a block an adapter is on: Linears of the attention in each stream, and feed-forwards."""

    image_attention: int
    text_attention: int
    experts: bool
    shared: bool
    text: bool


def largest_batch(spec: JobSpec, config: TransformerConfig, sizes: Sequence[tuple[int, int]] | None) -> Batch:
    """Return the batch that needs most; `sizes` are the buckets' in pixels, None where they are not known yet.

    A picture that is not square costs one token more than it has, for its folded padding (design 7).
    """
    pixels_per_token = (8 * config.patch_size) ** 2
    tokens = [width * height // pixels_per_token + (0 if width == height else 1) for width, height in sizes or ()]
    if not tokens:
        areas = [min(int(choice.resolution**2), config.max_pixels) for choice in spec.datasets]
        tokens = [max(1, area // pixels_per_token) for area in areas]
    return Batch(num_samples=spec.optimization.batch_size, image_tokens=max(tokens, default=config.max_image_tokens))


def worker_memory(
    spec: JobSpec, config: TransformerConfig, selection: AdapterSelection, batch: Batch
) -> list[job_pb2.EstimatePart]:
    """Return the parts of a worker's memory, largest first as a rule; their sum is what it needs."""
    compute_bytes = _compute_bytes(spec)
    blocks = _block_values(config, selection, batch, compute_bytes)
    parts = {
        f"transformer weights ({spec.model.base_precision})": _weights(spec, config),
        f"adapter, gradient, {spec.optimization.optimizer} state": _adapter(spec, selection),
        **_activations(spec, config, batch, [values * compute_bytes for values in blocks]),
        "text embeddings": batch.num_samples * text_values(config) * compute_bytes,
        "de-quantised weights": _dequantised(spec, config, compute_bytes),
        "context and fragmentation": _CONTEXT_BYTES,
    }
    return [job_pb2.EstimatePart(name=name, size_bytes=int(size)) for name, size in parts.items() if size]


def total_bytes(parts: Sequence[job_pb2.EstimatePart]) -> int:
    """Return the sum of the parts of an estimate."""
    return sum(part.size_bytes for part in parts)


def text_values(config: TransformerConfig) -> int:
    """Return the values of one caption's embeddings: T5, every Llama layer that the model reads, pooled (spec 1.2)."""
    t5_channels, llama_channels = config.caption_channels
    tokens = TEXT_TOKENS // 3
    num_layers = max(config.llama_layers) + 1
    return tokens * t5_channels + num_layers * tokens * llama_channels + config.text_emb_dim


def _compute_bytes(spec: JobSpec) -> int:
    return 2 if spec.model.mixed_precision == "bf16" else 4


def _weights(spec: JobSpec, config: TransformerConfig) -> float:
    """Resident weights; blocks that wait in host memory count as the two that are being used and copied."""
    by_block: dict[str, float] = {}
    for module in enumerate_modules(config):
        block = ".".join(module.name.split(".")[:2]) if "_stream_blocks." in module.name else ""
        by_block[block] = by_block.get(block, 0.0) + _module_bytes(spec, module)
    outside = by_block.pop("", 0.0)
    blocks = list(by_block.values())
    offloaded = _offloaded(min(spec.memory.num_offloaded_blocks, len(blocks)), len(blocks))
    waiting = [blocks[index] for index in offloaded]
    staged = min(2 * max(waiting, default=0.0), sum(waiting))
    return outside + sum(blocks) - sum(waiting) + staged


def _offloaded(num_chosen: int, num_blocks: int) -> list[int]:
    """Indices of the blocks that wait in host memory: those that the worker chooses, evenly spread."""
    return [(place + 1) * num_blocks // num_chosen - 1 for place in range(num_chosen)]


def _module_bytes(spec: JobSpec, module: ModuleNode) -> float:
    compute_bytes = _compute_bytes(spec)
    size = float(module.num_own_parameters * compute_bytes)
    if module.shape is None:
        return size
    out_features, in_features = module.shape
    precision = PRECISIONS.get(spec.model.base_precision, PRECISIONS[NO_CHANGE])
    is_plain = spec.model.base_precision == NO_CHANGE or not precision.fits(in_features, out_features)
    weight_bytes = compute_bytes if is_plain else precision.bits / 8
    return size + out_features * in_features * weight_bytes + out_features * compute_bytes * module.has_bias


def _adapter(spec: JobSpec, selection: AdapterSelection) -> float:
    entry = find_optimizer(spec.optimization.optimizer)
    number_bytes = 2 if entry.dtype == "bfloat16" else 4
    # Full-rank tuning trains the weights themselves, which are counted as such.
    weight = 0 if isinstance(spec.adapter, FullRank) else number_bytes
    gradient = 0 if spec.optimization.gradient_release else number_bytes
    average = 0 if spec.ema is None else 4
    per_parameter: float = weight + gradient + entry.state_bytes + average
    return selection.num_parameters * per_parameter


def _activations(
    spec: JobSpec, config: TransformerConfig, batch: Batch, block_bytes: Sequence[float]
) -> Mapping[str, float]:
    """What the forward pass leaves for the backward pass, and what that adds."""
    tokens = batch.num_samples * (batch.image_tokens + TEXT_TOKENS)
    stream = tokens * config.width * _compute_bytes(spec)
    interval = _interval(spec)
    recomputed = [size for index, size in enumerate(block_bytes) if interval and index % interval == 0]
    kept = [size for index, size in enumerate(block_bytes) if not interval or index % interval]
    working = _BACKWARD_WIDTHS * stream + batch.num_samples * batch.image_tokens * _LATENT_BYTES_PER_TOKEN
    return {
        f"inputs of {len(recomputed)} recomputed blocks": len(recomputed) * stream,
        "one recomputed block": max(recomputed, default=0.0),
        f"activations of {len(kept)} blocks": sum(kept),
        "gradients of activations, latents": working,
    }


def _block_values(
    config: TransformerConfig, selection: AdapterSelection, batch: Batch, compute_bytes: int
) -> list[float]:
    """Values that each block keeps for the backward pass, double blocks first."""
    adapted = [_adapted(selection, name) for name in _block_names(config)]
    image = batch.num_samples * batch.image_tokens
    text = batch.num_samples * TEXT_TOKENS
    return [
        image * _image_values(config, parts, compute_bytes) + text * _text_values(config, parts, compute_bytes)
        if index < config.num_layers
        else (image + text) * _image_values(config, parts, compute_bytes)
        for index, parts in enumerate(adapted)
    ]


def _block_names(config: TransformerConfig) -> list[str]:
    return [
        *(f"double_stream_blocks.{index}.block." for index in range(config.num_layers)),
        *(f"single_stream_blocks.{index}.block." for index in range(config.num_single_layers)),
    ]


def _adapted(selection: AdapterSelection, block: str) -> _Adapted:
    names = [name.removeprefix(block) for name in selection.names if name.startswith(block)]
    return _Adapted(
        image_attention=sum(name == f"attn1.{linear}" for name in names for linear in _ATTENTION_LINEARS),
        text_attention=sum(name == f"attn1.{linear}_t" for name in names for linear in _ATTENTION_LINEARS),
        experts=any(name.startswith("ff_i.experts.") for name in names),
        shared=any(name.startswith("ff_i.shared_experts.") for name in names),
        text=any(name.startswith("ff_t.") for name in names),
    )


def _image_values(config: TransformerConfig, adapted: _Adapted, compute_bytes: int) -> float:
    """For each token that goes through the experts."""
    widths = _IMAGE_WIDTHS + adapted.image_attention - (0 if compute_bytes == 2 else _NORM_WIDTHS)
    experts = _swiglu(config.width, swiglu_width(4 * config.width), adapted.experts)
    shared = _swiglu(config.width, swiglu_width(2 * config.width), adapted.shared)
    return widths * config.width + config.num_activated_experts * experts + shared


def _text_values(config: TransformerConfig, adapted: _Adapted, compute_bytes: int) -> float:
    """For each token of the text stream of a double block."""
    widths = _TEXT_WIDTHS + adapted.text_attention - (0 if compute_bytes == 2 else _NORM_WIDTHS)
    return widths * config.width + _swiglu(config.width, swiglu_width(4 * config.width), adapted.text)


def _swiglu(width: int, inner: int, is_adapted: bool) -> float:
    values = _SWIGLU_INNER_WIDTHS * inner
    return values + (_ADAPTED_SWIGLU_INNER_WIDTHS * inner + _ADAPTED_SWIGLU_WIDTHS * width if is_adapted else 0)


def _dequantised(spec: JobSpec, config: TransformerConfig, compute_bytes: int) -> float:
    """A product takes a quantised weight back to the compute dtype, and once more for its gradient."""
    if spec.model.base_precision == NO_CHANGE:
        return 0.0
    sizes = {node.name: node.shape[0] * node.shape[1] for node in enumerate_modules(config) if node.shape is not None}
    if not PRECISIONS[spec.model.base_precision].keeps_copies:
        return 2 * max(sizes.values()) * compute_bytes
    blocks = [
        sum(size for name, size in sizes.items() if name.startswith(block)) * compute_bytes
        for block in _block_names(config)
    ]
    interval = _interval(spec)
    recomputed = [size for index, size in enumerate(blocks) if interval and index % interval == 0]
    return sum(blocks) - sum(recomputed) + max(recomputed, default=0)


def _interval(spec: JobSpec) -> int:
    """Blocks whose index is a multiple are recomputed; 0 for none."""
    return spec.memory.gradient_checkpointing_interval if spec.optimization.gradient_checkpointing else 0
