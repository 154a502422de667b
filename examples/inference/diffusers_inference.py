"""From a prompt and an adapter to a PNG, with diffusers and lycoris-lora alone: no Reverie code is used or needed.

    pip install torch diffusers transformers accelerate peft lycoris-lora optimum-quanto
    python diffusers_inference.py --model HiDream-ai/HiDream-I1-Full --adapter pytorch_lora_weights.safetensors \
        --prompt "a photo of a zorp" --output zorp.png

`--model` and `--llama` are directories or Hub ids, `--adapter` is a file or a Hub id. A LoKr, or another adapter of
LyCORIS, is merged into the weights before they are quantised; a LoRA is loaded by diffusers and fused.
"""

import argparse
import gc
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import HiDreamImagePipeline
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaForCausalLM

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main() -> None:
    """Draw one picture."""
    options = parse_options()
    device = options.device or best_device()
    pipeline = load_pipeline(options.model, options.llama, DTYPES[options.dtype])
    if options.adapter:
        add_adapter(pipeline, find_adapter(options.adapter), options.strength)
    if options.quantize != "none":
        quantize(pipeline.transformer, options.quantize)
    pipeline.to(device)
    embeddings = encode(pipeline, options.prompt, options.negative_prompt, with_negative=options.guidance > 1)
    image = draw(pipeline, embeddings, options, device)
    image.save(options.output, format="PNG")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HiDream-ai/HiDream-I1-Full", help="checkpoint directory or Hub id")
    parser.add_argument(
        "--llama", help="directory or Hub id of Llama-3.1-8B-Instruct; default: the one in the checkpoint"
    )
    parser.add_argument("--adapter", help="adapter file or Hub id; none draws with the base model")
    parser.add_argument("--strength", type=float, default=1.0, help="of the adapter; default 1.0, as trained")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative-prompt", default="", help="used with a guidance above 1")
    parser.add_argument("--steps", type=int, default=50, help="50 for Full, 28 for Dev, 16 for Fast")
    parser.add_argument("--guidance", type=float, default=5.0, help="5.0 for Full, 0 for Dev and Fast")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quantize", choices=("none", "int8"), default="none", help="int8: as int8-quanto in training")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--device", help="default: cuda, else mps, else cpu")
    parser.add_argument("--output", type=Path, default=Path("output.png"))
    options = parser.parse_args()
    if options.width % 16 or options.height % 16:
        parser.error(f"{options.width}x{options.height}: width and height must be multiples of 16")
    return options


def best_device() -> str:
    """What this machine draws fastest with."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_pipeline(model: str, llama: str | None, dtype: torch.dtype) -> HiDreamImagePipeline:
    """All components; the released checkpoints come without Llama, which `--llama` names."""
    parts: dict[str, Any] = {}
    if llama is not None:
        parts["tokenizer_4"] = AutoTokenizer.from_pretrained(llama)
        parts["text_encoder_4"] = LlamaForCausalLM.from_pretrained(llama, dtype=dtype)
    return HiDreamImagePipeline.from_pretrained(model, dtype=dtype, **parts)


def find_adapter(adapter: str) -> Path:
    """The adapter's file; downloads it where the name is no file."""
    if Path(adapter).is_file():
        return Path(adapter)
    if Path(adapter).is_dir():
        return Path(adapter) / ADAPTER_FILE
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo_id=adapter, filename=ADAPTER_FILE))


def add_adapter(pipeline: HiDreamImagePipeline, file: Path, strength: float) -> None:
    """Put an adapter into the transformer's weights, which must not be quantised yet."""
    with safe_open(file, "pt") as tensors:
        is_lora = any(".lora_A." in key for key in tensors.keys())  # noqa: SIM118  # it is no dictionary
    if is_lora:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        pipeline.fuse_lora(lora_scale=strength)
        pipeline.unload_lora_weights()
    else:
        merge_lycoris(pipeline.transformer, file, strength)


def merge_lycoris(transformer: torch.nn.Module, file: Path, strength: float) -> int:
    """Merge a LoKr or another adapter of LyCORIS; returns the number of changed layers."""
    from lycoris import create_lycoris_from_weights

    network, _ = create_lycoris_from_weights(strength, str(file), transformer)
    if not network.loras:
        raise SystemExit(f"{file}: none of its modules is in this transformer; it was trained on another model")
    for module in network.loras:
        if type(module).__name__ in ("LokrModule", "LohaModule"):
            # lycoris-lora 4.1.3 multiplies with the scale twice when it merges these; its root, twice, is right.
            module.scale = math.sqrt(module.scale)
    # `precise` sums in float32: in bfloat16 most of a small change would be rounded away.
    network.merge_to(strength, precise=True)
    return len(network.loras)


def quantize(transformer: torch.nn.Module, precision: str) -> None:
    """Hold the weights as int8; saves memory, not time."""
    from optimum.quanto import freeze, qint8
    from optimum.quanto import quantize as quanto_quantize

    assert precision == "int8"  # noqa: S101  # the only choice
    quanto_quantize(transformer, weights=qint8)
    freeze(transformer)


@torch.inference_mode()
def encode(
    pipeline: HiDreamImagePipeline, prompt: str, negative: str, *, with_negative: bool
) -> dict[str, torch.Tensor]:
    """The prompt's embeddings; the text encoders are dropped afterwards, for they take most of the memory."""
    t5, no_t5, llama, no_llama, pooled, no_pooled = pipeline.encode_prompt(
        prompt=prompt,
        prompt_2=None,
        prompt_3=None,
        prompt_4=None,
        negative_prompt=negative,
        do_classifier_free_guidance=with_negative,
    )
    embeddings = {"prompt_embeds_t5": t5, "prompt_embeds_llama3": llama, "pooled_prompt_embeds": pooled}
    if with_negative:
        embeddings |= {
            "negative_prompt_embeds_t5": no_t5,
            "negative_prompt_embeds_llama3": no_llama,
            "negative_pooled_prompt_embeds": no_pooled,
        }
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4"):
        setattr(pipeline, name, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return embeddings


@torch.inference_mode()
def draw(
    pipeline: HiDreamImagePipeline, embeddings: dict[str, torch.Tensor], options: argparse.Namespace, device: str
) -> Any:
    """The picture, at the size that was asked for."""
    # The pipeline takes width and height for an aspect ratio and rescales to the area of `default_sample_size`; the
    # millionth keeps a side from being rounded down to the next lower multiple of 16.
    pipeline.default_sample_size = math.sqrt(options.width * options.height) / pipeline.vae_scale_factor * (1 + 1e-6)
    return pipeline(
        **embeddings,
        width=options.width,
        height=options.height,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        generator=torch.Generator(device).manual_seed(options.seed),
    ).images[0]


if __name__ == "__main__":
    main()
