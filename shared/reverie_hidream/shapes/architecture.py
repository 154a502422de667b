"""The parts of `reverie-tiny-shapes`: the real checkpoint's classes and layout at a few million parameters."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from reverie_hidream.checkpoint import progress_bars_disabled
from reverie_hidream.randomness import Draw
from reverie_hidream.shapes.captions import CONSONANTS, FILLERS, VOWELS, WORLD_WORDS, caption_of, invented_word
from reverie_hidream.shapes.world import CANVAS_PIXELS, World
from reverie_hidream.tiny_tokenizers import clip_tokenizer, llama_tokenizer
from reverie_hidream.tiny_weights import draw_weights, shape_posterior
from reverie_hidream.transformer import VAE_SCALE

MAX_BYTES = 12_000_000
"""Of all weights in bfloat16, headers aside."""

NUM_TOKENS = 20
"""Of a caption for T5 and for Llama, special tokens included: the transformer attends to three times as many."""

SCALING_FACTOR, SHIFT_FACTOR = 0.3611, 0.1159
LATENT_CHANNELS = 16

_CLIP_POSITIONS = {"clip_l": 248, "clip_g": 218}
_NUM_CAPTIONS, _NUM_INVENTED = 3000, 3000


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Sizes of all parts; the defaults are those of the checkpoint."""

    vae_channels: tuple[int, int, int, int] = (16, 32, 48, 48)
    width: int = 96
    """Of the transformer."""
    num_heads: int = 3
    num_double_blocks: int = 3
    num_single_blocks: int = 5
    clip_l_width: int = 32
    clip_g_width: int = 48
    t5_width: int = 64
    llama_width: int = 80
    num_llama_layers: int = 3
    schedule_shift: float = 3.0
    """Of the noise schedule in training and drawing: the released checkpoint's."""


def build_vae(architecture: Architecture, *, seed: int) -> AutoencoderKL:
    """The VAE with random weights, a pure function of the seed; float32."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=architecture.vae_channels,
        layers_per_block=1,
        # Few groups: each takes a mean away, and a flat picture has little else to tell.
        norm_num_groups=4,
        sample_size=1024,
        scaling_factor=SCALING_FACTOR,
        shift_factor=SHIFT_FACTOR,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    draw_weights(vae, seed=seed, component="vae")
    shape_posterior(vae)
    return vae


def build_transformer(architecture: Architecture, *, seed: int) -> HiDreamImageTransformer2DModel:
    """The transformer with random weights, a pure function of the seed; float32, with gradients to all experts."""
    head_width = architecture.width // architecture.num_heads
    num_blocks = architecture.num_double_blocks + architecture.num_single_blocks
    canvas = CANVAS_PIXELS // VAE_SCALE
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=architecture.num_double_blocks,
        num_single_layers=architecture.num_single_blocks,
        attention_head_dim=head_width,
        num_attention_heads=architecture.num_heads,
        caption_channels=[architecture.t5_width, architecture.llama_width],
        text_emb_dim=architecture.clip_l_width + architecture.clip_g_width,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(head_width // 2, head_width // 4, head_width // 4),
        max_resolution=(canvas, canvas),
        llama_layers=[min(block, architecture.num_llama_layers - 1) for block in range(num_blocks)],
    )
    draw_weights(transformer, seed=seed, component="transformer")
    _start_at_zero(transformer)
    return transformer


def build_encoders(architecture: Architecture, *, seed: int) -> dict[str, Any]:
    """The four text encoders by name with random weights, pure functions of the seed; float32."""
    encoders: dict[str, Any] = {
        "clip_l": CLIPTextModelWithProjection(_clip_config(architecture.clip_l_width, "clip_l")),
        "clip_g": CLIPTextModelWithProjection(_clip_config(architecture.clip_g_width, "clip_g")),
        "t5": T5EncoderModel(_t5_config(architecture)),
        "llama": LlamaForCausalLM(_llama_config(architecture)),
    }
    for name, encoder in encoders.items():
        draw_weights(encoder, seed=seed, component=name)
    return encoders


@cache
def build_tokenizers() -> Mapping[str, PreTrainedTokenizerBase]:
    """The four tokenizers by the names of their encoders: a word of the world is one token, others are a few."""
    lines = corpus()
    tokenizers = {
        "clip_l": clip_tokenizer(lines, model_max_length=248),
        "clip_g": clip_tokenizer(lines, model_max_length=218, pad_token="!"),  # noqa: S106 (not a password)
        "t5": _t5_tokenizer(),
        "llama": llama_tokenizer(lines, model_max_length=NUM_TOKENS),
    }
    for tokenizer in tokenizers.values():
        tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizers["llama"].pad_token = tokenizers["llama"].eos_token
    return tokenizers


def corpus() -> list[str]:
    """What the tokenizers are trained on: captions, filler, and words that mean nothing, a few to a line."""
    world, draw = World(seed=0), Draw(seed=0, stream="shapes/corpus")
    captions = [caption_of(world.training_scene(index), draw, index) for index in range(_NUM_CAPTIONS)]
    generator = draw.generator(0, 1)
    invented = [invented_word(generator) for _ in range(_NUM_INVENTED)]
    lines = [" ".join(invented[start : start + 5]) for start in range(0, _NUM_INVENTED, 5)]
    return [*captions, *(" ".join(FILLERS) for _ in range(_NUM_CAPTIONS // 20)), *lines]


def num_parameters(architecture: Architecture) -> dict[str, int]:
    """Parameters of every part, without their memory."""
    with torch.device("meta"):
        parts = {
            "vae": AutoencoderKL.from_config(build_vae(architecture, seed=0).config),
            "transformer": HiDreamImageTransformer2DModel.from_config(build_transformer(architecture, seed=0).config),
            **build_encoders(architecture, seed=0),
        }
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}


def save_checkpoint(
    directory: Path,
    architecture: Architecture,
    *,
    vae: nn.Module,
    transformer: nn.Module,
    encoders: Mapping[str, nn.Module],
) -> None:
    """Write a checkpoint in the Hugging Face layout, bfloat16; the modules stay as they are."""
    tokenizers = build_tokenizers()
    modules = {"vae": vae, "transformer": transformer}
    for number, name in enumerate(("clip_l", "clip_g", "t5", "llama"), start=1):
        modules[_part("text_encoder", number)] = encoders[name]
    components: dict[str, Any] = {part: _stored(module) for part, module in modules.items()}
    for number, tokenizer in enumerate(tokenizers.values(), start=1):
        components[_part("tokenizer", number)] = tokenizer
    scheduler = FlowMatchEulerDiscreteScheduler(shift=architecture.schedule_shift, num_train_timesteps=1000)
    with progress_bars_disabled():
        HiDreamImagePipeline(scheduler=scheduler, **components).save_pretrained(directory, safe_serialization=True)
    _name_tokenizer_portably(directory)


def weight_bytes(directory: Path) -> int:
    """Size of all weights of a checkpoint."""
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors"))


def _t5_tokenizer() -> T5Tokenizer:
    """Whole words first, then syllables, then letters: a trained unigram model would cut the world's words up."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    syllables = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\u2581{word}", -2.0) for word in sorted(WORLD_WORDS) if len(word) > 1]
    pieces += [(mark + piece, -6.0) for mark in ("\u2581", "") for piece in syllables]
    pieces += [("\u2581a", -2.0), ("\u2581", -8.0), (",", -2.0), *((letter, -8.0) for letter in letters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=NUM_TOKENS)


def _start_at_zero(transformer: Any) -> None:
    """Let every block begin as the identity, and the prediction as zero: diffusion transformers train best so."""
    with torch.no_grad():
        for block in (*transformer.double_stream_blocks, *transformer.single_stream_blocks):
            block.block.adaLN_modulation[1].weight.zero_()
            block.block.adaLN_modulation[1].bias.zero_()
        for layer in (transformer.final_layer.linear, transformer.final_layer.adaLN_modulation[1]):
            layer.weight.zero_()
            layer.bias.zero_()


def _stored(module: nn.Module) -> nn.Module:
    """A copy in bfloat16, frozen: training goes on in float32."""
    stored: nn.Module = nn.Module.to(copy.deepcopy(module), torch.bfloat16).requires_grad_(False).eval()
    return stored


def _part(name: str, number: int) -> str:
    return name if number == 1 else f"{name}_{number}"


def _clip_config(width: int, name: str) -> CLIPTextConfig:
    tokenizer = build_tokenizers()[name]
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=_CLIP_POSITIONS[name],
        hidden_act="quick_gelu" if name == "clip_l" else "gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5_config(architecture: Architecture) -> T5Config:
    return T5Config(
        vocab_size=len(build_tokenizers()["t5"]),
        d_model=architecture.t5_width,
        d_kv=16,
        d_ff=2 * architecture.t5_width,
        num_layers=2,
        num_heads=4,
        # Buckets of distances that captions of NUM_TOKENS can have.
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        use_cache=False,
        is_encoder_decoder=False,
    )


def _llama_config(architecture: Architecture) -> LlamaConfig:
    tokenizer = build_tokenizers()["llama"]
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=architecture.llama_width,
        intermediate_size=2 * architecture.llama_width,
        num_hidden_layers=architecture.num_llama_layers,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        use_cache=False,
    )


def _name_tokenizer_portably(checkpoint: Path) -> None:
    """Call tokenizer_4 what every version of transformers calls it, with no pad token, as Llama has none."""
    portable = "PreTrainedTokenizerFast"
    _edit_json(checkpoint / "model_index.json", {"tokenizer_4": ["transformers", portable]})
    _edit_json(checkpoint / "tokenizer_4" / "tokenizer_config.json", {"tokenizer_class": portable, "pad_token": None})


def _edit_json(path: Path, changes: Mapping[str, object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
