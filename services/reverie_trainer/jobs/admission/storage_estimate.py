"""What a job's latents and embeddings take in the store, under each embedding_storage (spec 6.4, trap 38)."""

from collections.abc import Mapping, Sequence

from reverie.training.v1 import job_pb2
from reverie_common.storage.keys import ON_DEMAND_OBJECTS

from reverie_trainer.jobs.admission.adapter_selection import TransformerConfig

# mean and std, 16 channels each, 8 x 8 pixels to a latent pixel, float32 (spec 1.3).
_LATENT_BYTES_PER_PIXEL = 2 * 16 * 4 / 64

# Byte shuffle and zstd make embeddings so much smaller at best; random numbers by less.
_BEST_COMPRESSION = 1.6

# int8 and one bfloat16 for each 32 values.
_COMPACT_BYTES = 1 + 2 / 32

_TOKENS = 128
_NUM_ENCODERS = 4


def storage_parts(
    storage: str,
    config: TransformerConfig,
    *,
    num_prompts: int,
    num_pixels: int,
    value_bytes: int = 2,
    num_on_demand: int = ON_DEMAND_OBJECTS,
) -> list[job_pb2.EstimatePart]:
    """Return what one job writes, before sharing with others.

    Args:
        storage: the job's embedding_storage.
        num_prompts: distinct ones, the empty one included.
        num_pixels: over all images, after their crops.
        value_bytes: of one number of an embedding: 2, or 4 where the encoders compute in float32.
        num_on_demand: embeddings that the encoder service keeps for a while.
    """
    latents = job_pb2.EstimatePart(name="latents", size_bytes=int(num_pixels * _LATENT_BYTES_PER_PIXEL))
    kept = num_prompts
    if storage == "on_demand":
        # The empty prompt is kept for good; of the others what fits into the bound.
        kept = min(num_prompts, 1 + num_on_demand // _NUM_ENCODERS)
    return [
        latents,
        *(_text_part(name, kept * values, storage, value_bytes) for name, values in _values(config).items()),
    ]


def storage_totals(parts: Mapping[str, Sequence[job_pb2.EstimatePart]]) -> list[job_pb2.EstimatePart]:
    """Return the sums of the parts under each embedding_storage."""
    return [
        job_pb2.EstimatePart(
            name=name,
            size_bytes=sum(part.size_bytes for part in own),
            least_bytes=sum(part.least_bytes or part.size_bytes for part in own),
        )
        for name, own in parts.items()
    ]


def _values(config: TransformerConfig) -> Mapping[str, int]:
    """Values of one prompt's embeddings (spec 1.2)."""
    t5_channels, llama_channels = config.caption_channels
    return {
        "T5 embeddings": _TOKENS * t5_channels,
        "Llama embeddings": (max(config.llama_layers) + 1) * _TOKENS * llama_channels,
        "pooled embeddings": config.text_emb_dim,
    }


def _text_part(name: str, num_values: int, storage: str, value_bytes: int) -> job_pb2.EstimatePart:
    size_bytes = num_values * value_bytes
    if name.startswith("pooled"):
        return job_pb2.EstimatePart(name=name, size_bytes=size_bytes)
    if storage == "compact":
        return job_pb2.EstimatePart(name=name, size_bytes=int(num_values * _COMPACT_BYTES))
    return job_pb2.EstimatePart(name=name, size_bytes=size_bytes, least_bytes=int(size_bytes / _BEST_COMPRESSION))
