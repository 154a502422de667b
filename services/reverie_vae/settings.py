"""Settings of the VAE service: `REVERIE_VAE_<FIELD>` or `--field`; the store's are `REVERIE_STORE_<FIELD>`."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict
from reverie_common.concurrency import BatchLimits
from reverie_common.settings import CommaSeparated, ServerSettings, StoreSettings

from reverie_vae.limits import DEFAULT_MAX_PIXELS


class VaeSettings(ServerSettings, StoreSettings):
    """Which VAE this process holds, and what it accepts."""

    model_config = SettingsConfigDict(env_prefix="REVERIE_VAE_")

    port: int = Field(default=50052, ge=0, le=65535)
    """gRPC port; 0 takes any free one."""

    metrics_port: int = Field(default=9102, ge=0, le=65535)
    """Port of Prometheus /metrics; 0 takes any free one."""

    checkpoint: str
    """HiDream checkpoint: a directory, an s3:// prefix of the store, or a Hub id such as HiDream-ai/HiDream-I1-Full."""

    cache_dir: Path | None = None
    """Directory for checkpoints that are not local; default is the Hub's cache."""

    device: str = "cpu"
    """torch device, for instance `cuda:0`."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the VAE's weights and activations; latents are stored in float32."""

    num_threads: int = Field(default=1, ge=1)
    """torch threads on the CPU."""

    preview_decoder: str = ""
    """Tiny decoder of previews: a directory, an s3:// prefix or a Hub id; `none` for no previews. Default: vae_preview/
    of the checkpoint if it is there, else madebyollin/taef1. It is loaded with the first preview."""

    decode_threads: int = Field(default=2, ge=1)
    """Image files that are fetched and decoded at a time. Each takes up to 3 bytes for each of max_pixels."""

    max_pixels: int = Field(default=DEFAULT_MAX_PIXELS, ge=1)
    """Images over this many pixels are rejected before they are decoded."""

    source_buckets: CommaSeparated = ()
    """Other buckets of the store's server whose images may be read where they are, BUCKET[,BUCKET]; the trainer's
    setting of the same name says which may be imported."""

    max_batch_size: int = Field(default=4, ge=1, le=64)
    """Images of one size in one forward."""

    batch_window_seconds: float = Field(default=0.01, ge=0, le=10)
    """How long an image waits for others of its size while the VAE is idle."""

    max_waiting: int = Field(default=256, ge=1)
    """Decoded images that may wait for the VAE, 3 MB each at 1 megapixel; further ones are refused."""

    max_in_flight: int = Field(default=16, ge=1)
    """Images of one request that are worked on at a time, so that one request does not fill the queue."""

    idle_seconds: float = Field(default=0.0, ge=0)
    """After so long without work the VAE moves to host memory, until the next request; 0 never moves. On a CPU
    nothing moves."""

    def batch_limits(self) -> BatchLimits:
        """The encoding batches' limits. Results are stored while the next batch runs, hence two batches' worth."""
        return BatchLimits(
            max_batch_size=self.max_batch_size,
            window_seconds=self.batch_window_seconds,
            max_waiting=self.max_waiting,
            max_held=2 * self.max_batch_size,
        )
