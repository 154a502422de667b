"""The HiDream transformer: loading it frozen, and the velocity that it predicts.

The model is diffusers' class with diffusers' names; the forward pass is ours (`predict_velocity`): gradients reach
every expert (spec 2.2), and non-square sizes cost what they contain (design 7).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import HiDreamImageTransformer2DModel

from reverie_hidream import blocks
from reverie_hidream.assembly import CheckpointWeights, assemble, parts_of
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.host_blocks import HostBlocks
from reverie_hidream.memory import block_runner, blocks_of, host_blocks, keep_on_host, spread
from reverie_hidream.moe import RouterUse, stack_experts
from reverie_hidream.pad_folding import TokenLayout, lay_out, patchify, plan_attention, unpatchify
from reverie_hidream.quantise import check_precision, quantise

logger = logging.getLogger(__name__)

VAE_SCALE = 8
"""Pixels for each side of a latent pixel (spec 1.3)."""

# CUDA's fused attention copies a bias out to (B, heads, S, S) unless S is a multiple of 8; text tokens come in 128s.
_FUSED_ATTENTION_ALIGNMENT = 8

REAL_CONFIG: Mapping[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 16,
    "num_single_layers": 32,
    "attention_head_dim": 128,
    "num_attention_heads": 20,
    "caption_channels": [4096, 4096],
    "text_emb_dim": 2048,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": [64, 32, 32],
    "max_resolution": [128, 128],
    "llama_layers": [*range(32), *[31] * 16],
}
"""Configuration of the released Full, Dev and Fast checkpoints (spec 1.4)."""


def load_transformer(
    checkpoint_directory: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    precision: str = "no_change",
    quantize_via: str = "accelerator",
    num_offloaded_blocks: int = 0,
) -> HiDreamImageTransformer2DModel:
    """Load `transformer/` of a checkpoint, frozen, with gradients through all experts, quantised if asked for.

    Blocks while reading the weights: tens of seconds for the real ones. They come part by part, so that neither the
    host nor the device holds more than the result and one unquantised block.

    Args:
        checkpoint_directory: a checkpoint in the Hugging Face layout (spec 1.1).
        dtype: of the weights that are not quantised, and of the computation.
        precision: one of `precisions.PRECISIONS`.
        quantize_via: where weights are quantised: `accelerator`, on the device, or `cpu`.
        num_offloaded_blocks: blocks whose weights wait in host memory for their turn.

    Raises:
        OSError: the weights or the configuration are missing.
        ValueError: the precision is unknown or cannot be made there, or there are fewer blocks.
    """
    check_precision(precision, device=device)
    config = HiDreamImageTransformer2DModel.load_config(
        checkpoint_directory, subfolder="transformer", local_files_only=True
    )
    transformer = build_meta_transformer(config)
    offload = _Offload(transformer, num_offloaded_blocks, torch.device(device))
    with CheckpointWeights(checkpoint_directory / "transformer") as weights:
        assemble(
            transformer,
            weights,
            device=torch.device(device),
            dtype=dtype,
            precision=precision,
            quantize_via=quantize_via,
            on_part=offload.take,
        )
    offload.finish()
    prepare_transformer(transformer)
    if precision == "no_change" and torch.device(device).type == "cuda":
        _stack_all_experts(transformer)
    return transformer


def prepare_transformer(transformer: HiDreamImageTransformer2DModel, *, precision: str = "no_change") -> None:
    """Quantise and freeze a transformer in place, and let its own forward return images with gradients to all experts.

    Raises:
        ValueError: the model was built with `force_inference_output=True`, or the precision is unknown.
    """
    if any(getattr(module, "_force_inference_output", False) for module in transformer.modules()):
        raise ValueError("build the transformer with force_inference_output=False: it cuts gradients to the experts")
    for _, part in parts_of(transformer):
        quantise(part, precision)
    # The experts captured the constructor's False, so that gradients flow; unpatchify reads the configuration, so that
    # diffusers' own forward returns images in training mode too (spec 1.6).
    transformer.register_to_config(force_inference_output=True)
    transformer.train()
    # Freezing comes after quantising: quanto's freeze() turns requires_grad on again.
    transformer.requires_grad_(False)


def build_meta_transformer(config: Mapping[str, Any] = REAL_CONFIG) -> HiDreamImageTransformer2DModel:
    """The model of a configuration without memory for its weights, to count and to select modules."""
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device("meta"):
        transformer = HiDreamImageTransformer2DModel(**{**known, "force_inference_output": False})
    return transformer.requires_grad_(False)


def canvas_pixels(transformer: HiDreamImageTransformer2DModel) -> int:
    """Area of the largest non-square image in pixels: 1024 * 1024 for the released model."""
    height, width = transformer.config.max_resolution
    return int(height * width * VAE_SCALE**2)


def pixel_multiple(transformer: HiDreamImageTransformer2DModel) -> int:
    """Image sides must be multiples of this many pixels: 16 for the released model."""
    return int(transformer.config.patch_size) * VAE_SCALE


def check_image_size(transformer: HiDreamImageTransformer2DModel, *, width: int, height: int) -> None:
    """Refuse a size in pixels that the model cannot draw or train on.

    Raises:
        ValueError: with the value, the limit and what to do.
    """
    multiple = pixel_multiple(transformer)
    if width <= 0 or height <= 0 or width % multiple or height % multiple:
        raise ValueError(f"image size {width}x{height} must have positive sides that are multiples of {multiple}")
    if width != height and width * height > canvas_pixels(transformer):
        raise ValueError(
            f"image size {width}x{height} has {width * height} pixels; a non-square image may have "
            f"{canvas_pixels(transformer)}: lower it or make it square"
        )


def enable_gradient_checkpointing(transformer: HiDreamImageTransformer2DModel, enabled: bool) -> None:
    """Recompute each block in the backward pass instead of keeping its activations; the gradients are the same."""
    if enabled:
        transformer.enable_gradient_checkpointing()
    else:
        transformer.disable_gradient_checkpointing()


def predict_velocity(
    transformer: HiDreamImageTransformer2DModel,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: TextConditioning,
    router_uses: list[RouterUse] | None = None,
) -> torch.Tensor:
    """The velocity noise - latents that the model sees in noisy latents: its negated output (spec 3.1).

    Equal to diffusers' padded forward, at the cost of the real tokens (design 7). Any square size; a non-square one
    up to the canvas.

    Args:
        latents: (B, C, h, w), any floating dtype; computed in that of the model.
        timesteps: (B,) in 0 .. 1000, not rounded.
        conditioning: embeddings of B prompts.
        router_uses: gets one entry for each layer with routed experts, the same with and without checkpointing.

    Returns:
        (B, C, h, w) float32 (float64 for a float64 model).

    Raises:
        ValueError: the size does not fit, or the batch sizes differ.
    """
    dtype = transformer.x_embedder.proj.bias.dtype
    device = latents.device
    if conditioning.batch_size != latents.shape[0] or timesteps.shape != latents.shape[:1]:
        raise ValueError(
            f"{latents.shape[0]} latents need as many timesteps and prompts; "
            f"got {tuple(timesteps.shape)} timesteps and {conditioning.batch_size} prompts"
        )
    layout = lay_out(
        *latents.shape[-2:],
        patch_size=transformer.config.patch_size,
        max_tokens=transformer.max_seq,
        alignment=1 if device.type == "cpu" else _FUSED_ATTENTION_ALIGNMENT,
    )
    tokens = patchify(latents.to(dtype), layout, transformer.config.patch_size)
    output = _predict_tokens(transformer, tokens, timesteps, conditioning.to(device, dtype), layout, router_uses)
    velocity = -unpatchify(output, layout, transformer.config.patch_size)
    return velocity.to(torch.promote_types(dtype, torch.float32))


def _predict_tokens(
    transformer: HiDreamImageTransformer2DModel,
    tokens: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: TextConditioning,
    layout: TokenLayout,
    router_uses: list[RouterUse] | None = None,
) -> torch.Tensor:
    time_and_text = transformer.t_embedder(timesteps, tokens.dtype) + transformer.p_embedder(conditioning.pooled)
    captions = _Captions(transformer, conditioning)
    plan = plan_attention(transformer.pe_embedder, layout, captions.num_tokens, tokens)
    run = block_runner(transformer)
    # What a block returns is returned once; what it would leave somewhere else, a recomputed block would leave twice.
    image_counts, all_counts = _token_counts(layout, captions.num_tokens, tokens.device, router_uses)
    uses: list[RouterUse | None] = []

    image, text = transformer.x_embedder(tokens), captions.start()
    num_running = text.shape[1]
    for index, block in enumerate(transformer.double_stream_blocks):
        text = torch.cat([text, captions.of_block(index)], dim=1)
        image, text, use = run(index, blocks.double_block, block.block, image, text, time_and_text, plan, image_counts)
        text = text[:, :num_running]
        uses.append(use)

    hidden = torch.cat([image, text], dim=1)
    num_kept = hidden.shape[1]
    for index, block in enumerate(transformer.single_stream_blocks, start=len(transformer.double_stream_blocks)):
        hidden = torch.cat([hidden, captions.of_block(index)], dim=1)
        hidden, use = run(index, blocks.single_block, block.block, hidden, time_and_text, plan, all_counts)
        hidden = hidden[:, :num_kept]
        uses.append(use)

    if router_uses is not None:
        router_uses.extend(use for use in uses if use is not None)
    return blocks.final_layer(transformer.final_layer, hidden[:, : layout.num_real], time_and_text)


def _token_counts(
    layout: TokenLayout, num_text_tokens: int, device: torch.device, router_uses: list[RouterUse] | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """How many tokens each one stands for, of the image and of image and text; None where nobody asks."""
    if router_uses is None:
        return None, None
    counts = torch.ones(layout.num_tokens + num_text_tokens, device=device)
    if layout.num_pad_tokens:
        counts[layout.num_real : layout.num_tokens] = layout.num_padding / layout.num_pad_tokens
    return counts[: layout.num_tokens], counts


class _Captions:
    """The projected text of each block; projected when it is its block's turn, so that one at a time is in memory."""

    def __init__(self, transformer: HiDreamImageTransformer2DModel, conditioning: TextConditioning) -> None:
        self._projections = transformer.caption_projection
        self._layers = transformer.config.llama_layers
        self._conditioning = conditioning
        self._last = self._project(len(self._layers) - 1)

    @property
    def num_tokens(self) -> int:
        """Text tokens in every attention: T5, the last Llama layer of the list, the block's own Llama layer."""
        return int(self._conditioning.t5.shape[1] + 2 * self._conditioning.llama.shape[2])

    def start(self) -> torch.Tensor:
        """The running text state before the first block: T5, then the list's last Llama layer. (B, 2 T, D)"""
        return torch.cat([self._projections[-1](self._conditioning.t5), self._last], dim=1)

    def of_block(self, index: int) -> torch.Tensor:
        """The block's own Llama layer. (B, T, D)"""
        return self._last if index == len(self._layers) - 1 else self._project(index)

    def _project(self, index: int) -> torch.Tensor:
        projected: torch.Tensor = self._projections[index](self._conditioning.llama[self._layers[index]])
        return projected


class _Offload:
    """Moves some blocks to the host as soon as they are ready, while a transformer is put together."""

    def __init__(self, transformer: HiDreamImageTransformer2DModel, num_blocks: int, device: torch.device) -> None:
        self._transformer = transformer
        blocks = blocks_of(transformer)
        self._wanted = {id(blocks[index]): index for index in spread(num_blocks, len(blocks))}
        self._host = HostBlocks(device)

    def take(self, _: str, part: torch.nn.Module) -> None:
        if id(part) in self._wanted:
            self._host.add(self._wanted[id(part)], part)

    def finish(self) -> None:
        keep_on_host(self._transformer, self._host if self._wanted else None)


def _stack_all_experts(transformer: HiDreamImageTransformer2DModel) -> None:
    host = host_blocks(transformer)
    for index, block in enumerate((*transformer.double_stream_blocks, *transformer.single_stream_blocks)):
        # Stacks of weights that wait on the host would be another copy of them on the device.
        if hasattr(block.block.ff_i, "experts") and (host is None or index not in host):
            stack_experts(block.block.ff_i)
