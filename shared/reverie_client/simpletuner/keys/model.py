"""The model and the precision of its parts (spec 5.2, 5.3)."""

from collections.abc import Sequence

from reverie_client.simpletuner.precisions import BASE_PRECISIONS, ENCODER_PRECISIONS, NEAREST, nearest_precision
from reverie_client.simpletuner.rules import UNSET, Given, Option, Scope, choice, custom, flag, ignored, refused, words

ENCODERS = {1: "clip_l", 2: "clip_g", 3: "t5", 4: "llama"}
CHECKPOINT = "the weights are those of the services: `reverie up --checkpoint PLACE`"


def _without(allowed: Sequence[str]) -> dict[str, str]:
    return {name: nearest for name, nearest in NEAREST.items() if name not in allowed}


def _family(scope: Scope, given: Given) -> None:
    if str(given.value).lower() == "hidream":
        scope.honour(given, "", UNSET, "the one family that Reverie trains")
    else:
        scope.refuse(given, "Reverie trains HiDream-I1 only", "hidream is the family that works")


def _base_precision(scope: Scope, given: Given) -> None:
    name = str(given.value)
    if scope.value("model_type", "full") == "full" and name != "no_change":
        scope.refuse(given, "quantised weights cannot be trained themselves", "use no_change, or model_type lora")
    elif name in BASE_PRECISIONS:
        scope.honour(given, "model.base_precision", name)
    else:
        scope.refuse(given, f"{name!r} cannot hold a base that is trained on", nearest_precision(name, BASE_PRECISIONS))


def _encoder(number: int) -> Option:
    path = f"model.text_encoder_precision.{ENCODERS[number]}"

    def apply(scope: Scope, given: Given) -> None:
        name = str(given.value)
        if name in ENCODER_PRECISIONS:
            scope.honour(given, path, name, "the job demands it of the encoder service, which is started with it")
        else:
            scope.refuse(given, f"{name!r} cannot hold an encoder", nearest_precision(name, ENCODER_PRECISIONS))

    also = words(ENCODER_PRECISIONS[len(BASE_PRECISIONS) :])
    return custom(
        f"text_encoder_{number}_precision", apply, "honoured", path, f"those of base_model_precision, and {also}"
    )


def _quantize_via(scope: Scope, given: Given) -> None:
    if given.value == "pipeline":
        scope.change(given, "model.quantize_via", "accelerator", "every name is quantised block by block here")
    elif given.value in ("accelerator", "cpu"):
        scope.honour(given, "model.quantize_via", given.value)
    else:
        scope.refuse(given, f"there is no {given.value!r}", "use accelerator or cpu")


MODEL: tuple[Option, ...] = (
    custom("model_family", _family, "honoured", note="hidream; any other family is refused"),
    choice(
        "model_flavour",
        "model.flavour",
        ("full", "dev", "fast"),
        "a name for the metadata; the services' checkpoint decides",
    ),
    ignored("pretrained_model_name_or_path", CHECKPOINT),
    ignored("pretrained_transformer_model_name_or_path", CHECKPOINT),
    ignored("pretrained_transformer_subfolder", CHECKPOINT),
    ignored("pretrained_vae_model_name_or_path", CHECKPOINT),
    ignored("pretrained_t5_model_name_or_path", CHECKPOINT),
    ignored("pretrained_llama_model_name_or_path", CHECKPOINT),
    ignored("vae_path", CHECKPOINT),
    ignored("revision", CHECKPOINT),
    ignored("variant", CHECKPOINT),
    custom(
        "base_model_precision",
        _base_precision,
        "honoured",
        "model.base_precision",
        f"{words(BASE_PRECISIONS, _without(BASE_PRECISIONS))}, each with the nearest that works",
    ),
    *(_encoder(number) for number in ENCODERS),
    custom(
        "quantize_via",
        _quantize_via,
        "honoured",
        "model.quantize_via",
        "`pipeline` becomes `accelerator`: every name is quantised block by block",
    ),
    refused("quantize_activations", "no adapter can be trained through quantised activations", "leave it out"),
    choice(
        "mixed_precision",
        "model.mixed_precision",
        ("bf16", "no"),
        "",
        refused={
            "fp16": "float16 overflows in this model; the nearest that works is bf16",
            "fp8": "nothing computes in 8 bits here; the nearest that works is bf16",
        },
    ),
    ignored("base_model_default_dtype", "what is not quantised has the compute dtype, and the adapter is float32"),
    ignored("vae_dtype", "the VAE service decides"),
    ignored("vae_enable_tiling", "the VAE service decides"),
    ignored("vae_enable_slicing", "the VAE service decides"),
    ignored("vae_batch_size", "the VAE service takes as many pictures at once as fit"),
    ignored("vae_cache_disable", "latents lie in the store by content"),
    ignored("text_encoder_batch_size", "the encoder service decides"),
    refused(
        "tokenizer_max_length",
        "the encoders read 128 tokens, as the model was trained",
        "leave it out",
        off=(None, 0, 128, "128"),
    ),
    refused("train_text_encoder", "the text encoders stay frozen", "train the transformer alone"),
    refused("controlnet", "there is no ControlNet for HiDream here", "leave it out"),
    flag(
        "offload_during_startup",
        "memory.offload_during_startup",
        "the encoders and the VAE wait in host memory in turn",
    ),
)
