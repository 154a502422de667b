"""Settings of the sampler service: `REVERIE_SAMPLER_<FIELD>` or `--field`; the store's are `REVERIE_STORE_<FIELD>`."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict
from reverie_common.settings import CommaSeparated, ServerSettings, StoreSettings
from reverie_hidream.precisions import refusal


class SamplerSettings(ServerSettings, StoreSettings):
    """Which transformer this process holds, and whom it asks for text and pixels."""

    model_config = SettingsConfigDict(env_prefix="REVERIE_SAMPLER_")

    port: int = Field(default=50054, ge=0, le=65535)
    """gRPC port; 0 takes any free one."""

    metrics_port: int = Field(default=9104, ge=0, le=65535)
    """Port of Prometheus /metrics; 0 takes any free one."""

    checkpoint: str
    """HiDream checkpoint: a directory, an s3:// prefix of the store, or a Hub id such as HiDream-ai/HiDream-I1-Full."""

    cache_dir: Path | None = None
    """Directory for checkpoints that are not local; default is the Hub's cache."""

    encoders: CommaSeparated = ("127.0.0.1:50051",)
    """Encoder services, `host:port,host:port`; together they must hold all four encoders."""

    vae: str = "127.0.0.1:50052"
    """VAE service, `host:port`."""

    device: str = "cpu"
    """torch device, for instance `cuda:0`."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of activations and unquantised weights."""

    precision: str = "no_change"
    """How the transformer's weights are held: a name of docs/quantisation.md."""

    compile_backend: str = "inductor"
    """Backend of torch.compile for requests that ask for it; `inductor` needs a C++ compiler, on a GPU Triton too."""

    clip_model: str = ""
    """CLIP model of scores: a directory, an s3:// prefix or a Hub id, with safetensors; loaded with the first score.
    Empty: no scores."""

    clip_device: str = "cpu"
    """torch device of the CLIP model."""

    num_threads: int = Field(default=1, ge=1)
    """torch threads on the CPU."""

    max_adapters: int = Field(default=4, ge=1)
    """Adapters held in memory; the least recently used one goes first."""

    max_texts: int = Field(default=8, ge=0)
    """Prompts whose embeddings are held in memory, 34.6 MB each for the real model."""

    max_waiting: int = Field(default=64, ge=1)
    """Requests that may wait for their turn; further ones are refused with RESOURCE_EXHAUSTED."""

    patience_seconds: float = Field(default=60.0, ge=0)
    """How long an encoder or VAE service may be away before a request that needs it fails."""

    idle_seconds: float = Field(default=0.0, ge=0)
    """After so long without work the transformer moves to host memory, until the next request; 0 never moves. On a CPU
    nothing moves."""

    @field_validator("precision")
    @classmethod
    def _check_precision(cls, precision: str) -> str:
        problem = refusal(precision, is_trained_on=False)
        if problem is not None:
            raise ValueError(problem)
        return precision

    @field_validator("encoders")
    @classmethod
    def _check_encoders(cls, encoders: tuple[str, ...]) -> tuple[str, ...]:
        if not encoders:
            raise ValueError("no address given; name the encoder services as host:port,host:port")
        return encoders
