"""The files that a job makes: their names, and the URLs to download them from."""

from datetime import timedelta

from reverie.common.v1 import common_pb2
from reverie.training.v1 import job_pb2, training_pb2
from reverie_common.storage import ObjectStore

from reverie_trainer.jobs.spec import Adapter, FullRank

ADAPTER_PATH = "adapter/pytorch_lora_weights.safetensors"
LYCORIS_CONFIG_PATH = "adapter/lycoris_config.json"
EMA_ADAPTER_PATH = "adapter/ema_pytorch_lora_weights.safetensors"
TRANSFORMER_PATH = "transformer/diffusion_pytorch_model.safetensors"
EMA_TRANSFORMER_PATH = "ema_transformer/diffusion_pytorch_model.safetensors"
METRICS_PATH = "metrics.jsonl"

DOWNLOAD_EXPIRES = timedelta(hours=1)


def adapter_path(adapter: Adapter | None) -> str:
    """Return the path of what a job trained: an adapter's file, or a whole transformer under diffusers' name for it."""
    return TRANSFORMER_PATH if isinstance(adapter, FullRank) else ADAPTER_PATH


def ema_adapter_path(adapter: Adapter | None) -> str:
    """Return the path of the running average of what a job trained."""
    return EMA_TRANSFORMER_PATH if isinstance(adapter, FullRank) else EMA_ADAPTER_PATH


def validation_image_path(image: job_pb2.ValidationImage) -> str:
    """Return the path under which a validation picture is saved."""
    size = f"{image.width}x{image.height}"
    suffix = "_ema" if image.weights == "ema" else ""
    return f"validation/step_{image.step}_{image.prompt_name}_{image.image_index}_{size}{suffix}.png"


def artifact_message(store: ObjectStore, path: str, reference: common_pb2.ObjectRef) -> training_pb2.Artifact:
    """Return an artifact with a URL that needs no credentials for an hour. Blocks."""
    url = store.presign_get(store.key_of(reference.uri), expires=DOWNLOAD_EXPIRES)
    return training_pb2.Artifact(path=path, object=reference, download_url=url)
