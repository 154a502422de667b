"""A complete HiDream-I1 checkpoint of a few megabytes: real classes, real tokenizers, random weights.

It has the Hugging Face layout of the released checkpoint plus `text_encoder_4/`, `tokenizer_4/` and `vae_preview/` (the
tiny decoder of previews, whose pictures are as random as its weights), and is loaded by
exactly the code that loads the 17 B one. The same seed gives the same bytes. `python -m reverie_hidream.tiny DIR`
writes one.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
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
)

from reverie_hidream.checkpoint import progress_bars_disabled
from reverie_hidream.tiny_decoder import PART as PREVIEW_PART
from reverie_hidream.tiny_tokenizers import clip_tokenizer, corpus_lines, llama_tokenizer, t5_tokenizer
from reverie_hidream.tiny_weights import draw_weights, shape_posterior


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyShape:
    """What may differ between HiDream-shaped checkpoints. By default everything that can be small is.

    Widths all differ, so that a tensor of the wrong encoder cannot fit by accident. By default they are multiples of
    16, as the real ones are: torch's int8 product needs it.
    """

    num_double_blocks: int = 2
    num_single_blocks: int = 4
    num_heads: int = 4
    rope_axes: tuple[int, int, int] = (8, 4, 4)
    """They add up to the width of a head."""
    num_experts: int = 4
    num_active_experts: int = 2
    max_resolution: tuple[int, int] = (16, 64)
    """The canvas in latent pixels, not square by default: 256 tokens, so 65,536 pixels, as 1024 x 1024 is for the
    released model."""
    clip_l_width: int = 32
    clip_g_width: int = 48
    t5_width: int = 112
    llama_width: int = 96
    num_llama_heads: int = 6
    num_llama_layers: int = 4
    llama_layers: tuple[int, ...] = (0, 1, 2, 3, 3, 3)
    """The layer of Llama that each block reads."""


def make_tiny_checkpoint(directory: Path, *, seed: int = 0, shape: TinyShape | None = None) -> Path:
    """Write the checkpoint into the directory, replacing what is there, and return the directory.

    Written beside it first and moved into place, so a reader never sees half of one. Takes a few seconds.

    Args:
        shape: None is the tiny checkpoint of the documentation.
    """
    directory = Path(directory).absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        built = Path(scratch) / "checkpoint"
        with progress_bars_disabled():
            _pipeline(seed, shape or TinyShape()).save_pretrained(built, safe_serialization=True)
            _save_preview_decoder(seed, built / PREVIEW_PART)
        _name_tokenizer_portably(built)
        if directory.exists():
            shutil.rmtree(directory)
        built.rename(directory)
    return directory


def _pipeline(seed: int, shape: TinyShape) -> HiDreamImagePipeline:
    components: dict[str, nn.Module] = {
        "text_encoder": CLIPTextModelWithProjection(_clip_config(shape.clip_l_width, positions=248, act="quick_gelu")),
        "text_encoder_2": CLIPTextModelWithProjection(_clip_config(shape.clip_g_width, positions=218, act="gelu")),
        "text_encoder_3": T5EncoderModel(_t5_config(shape)),
        "text_encoder_4": LlamaForCausalLM(_llama_config(shape)),
        "transformer": _transformer(shape),
        "vae": _vae(),
    }
    for component, module in components.items():
        draw_weights(module, seed=seed, component=component)
        module.requires_grad_(False).eval()
    shape_posterior(components["vae"])
    # bfloat16 is what the released checkpoint holds; it also halves the file.
    stored = {component: nn.Module.to(module, torch.bfloat16) for component, module in components.items()}
    pipeline = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=1000), **_tokenizers(), **stored
    )
    # The pipeline sets it on its tokenizer; the released one has none, and loaders must set it themselves.
    pipeline.tokenizer_4.pad_token = None
    return pipeline


def _tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    lines = corpus_lines()
    return {
        "tokenizer": clip_tokenizer(lines, model_max_length=248),
        # OpenCLIP's bigG pads with "!", id 0, where CLIP-L pads with the end token.
        "tokenizer_2": clip_tokenizer(lines, model_max_length=218, pad_token="!"),  # noqa: S106 (not a password)
        "tokenizer_3": t5_tokenizer(lines, model_max_length=512),
        "tokenizer_4": llama_tokenizer(lines, model_max_length=131072),
    }


def _clip_config(width: int, *, positions: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=1024,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=positions,
        hidden_act=act,
        bos_token_id=1022,
        eos_token_id=1023,
        pad_token_id=1023 if act == "quick_gelu" else 0,
    )


def _t5_config(shape: TinyShape) -> T5Config:
    return T5Config(
        vocab_size=640,
        d_model=shape.t5_width,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        use_cache=False,
        is_encoder_decoder=False,
    )


def _llama_config(shape: TinyShape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=904,
        hidden_size=shape.llama_width,
        intermediate_size=192,
        num_hidden_layers=shape.num_llama_layers,
        num_attention_heads=shape.num_llama_heads,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=896,
        eos_token_id=900,
        tie_word_embeddings=False,
        use_cache=False,
    )


def _transformer(shape: TinyShape) -> HiDreamImageTransformer2DModel:
    return HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=shape.num_double_blocks,
        num_single_layers=shape.num_single_blocks,
        attention_head_dim=sum(shape.rope_axes),
        num_attention_heads=shape.num_heads,
        caption_channels=[shape.t5_width, shape.llama_width],
        text_emb_dim=shape.clip_l_width + shape.clip_g_width,
        num_routed_experts=shape.num_experts,
        num_activated_experts=shape.num_active_experts,
        axes_dims_rope=shape.rope_axes,
        max_resolution=shape.max_resolution,
        llama_layers=list(shape.llama_layers),
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _save_preview_decoder(seed: int, directory: Path) -> None:
    """In taef1's layout, narrower."""
    decoder = AutoencoderTiny(
        latent_channels=16,
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
    )
    draw_weights(decoder, seed=seed, component=PREVIEW_PART)
    decoder.requires_grad_(False).eval()
    nn.Module.to(decoder, torch.bfloat16).save_pretrained(directory, safe_serialization=True)
    # A field that its own class writes, does not know when it reads it, and warns of.
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    del config["block_out_channels"]
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _name_tokenizer_portably(checkpoint: Path) -> None:
    """Call tokenizer_4 what every version of transformers and the released checkpoint call it."""
    portable = "PreTrainedTokenizerFast"
    _edit_json(checkpoint / "model_index.json", {"tokenizer_4": ["transformers", portable]})
    _edit_json(checkpoint / "tokenizer_4" / "tokenizer_config.json", {"tokenizer_class": portable})


def _edit_json(path: Path, changes: dict[str, object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Write a tiny checkpoint into the directory that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m reverie_hidream.tiny", description=make_tiny_checkpoint.__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_tiny_checkpoint(arguments.directory, seed=arguments.seed)


if __name__ == "__main__":
    main()
