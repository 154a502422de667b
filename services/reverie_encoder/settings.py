"""Settings of the encoder service: `REVERIE_ENCODER_<FIELD>` or `--field`; the store's are `REVERIE_STORE_<FIELD>`."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict
from reverie_common.concurrency import BatchLimits
from reverie_common.settings import CommaSeparated, ServerSettings, StoreSettings
from reverie_common.storage.keys import ON_DEMAND_OBJECTS
from reverie_hidream.precisions import NO_CHANGE, refusal

ENCODER_NAMES = ("clip_l", "clip_g", "t5", "llama")


class EncoderSettings(ServerSettings, StoreSettings):
    """Which encoders this process holds, where and how."""

    model_config = SettingsConfigDict(env_prefix="REVERIE_ENCODER_")

    port: int = Field(default=50051, ge=0, le=65535)
    """gRPC port; 0 takes any free one."""

    metrics_port: int = Field(default=9101, ge=0, le=65535)
    """Port of Prometheus /metrics; 0 takes any free one."""

    encoders: CommaSeparated = ENCODER_NAMES
    """Encoders that this process holds: any of clip_l,clip_g,t5,llama."""

    checkpoint: str
    """HiDream checkpoint: a directory, an s3:// prefix of the store, or a Hub id such as HiDream-ai/HiDream-I1-Full."""

    llama_checkpoint: str | None = None
    """Where Llama comes from, if not from `text_encoder_4/` and `tokenizer_4/` of the checkpoint."""

    cache_dir: Path | None = None
    """Directory for checkpoints that are not local; default is the Hub's cache."""

    device: str = "cpu"
    """torch device of every encoder that has none of its own, for instance `cuda:0`."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of activations, embeddings and unquantised weights."""

    precision: CommaSeparated = (NO_CHANGE,)
    """How weights are held, a name of docs/quantisation.md: one for all encoders, or some by encoder as
    `t5=int8-quanto,llama=nf4-bnb`, which leaves the others as loaded."""

    clip_l_device: str | None = None
    """torch device of CLIP-L."""

    clip_g_device: str | None = None
    """torch device of CLIP-bigG."""

    t5_device: str | None = None
    """torch device of T5."""

    llama_device: str | None = None
    """torch device of Llama."""

    num_threads: int = Field(default=1, ge=1)
    """torch threads on the CPU. Encoders run side by side, one thread each, so more helps only with few encoders."""

    max_batch_size: int = Field(default=8, ge=1, le=1024)
    """Prompts in one forward of one encoder."""

    batch_window_seconds: float = Field(default=0.005, ge=0, le=10)
    """How long a prompt waits for others to share its batch while the encoder is idle."""

    max_waiting: int = Field(default=1024, ge=1)
    """Prompts that may wait for each encoder; further ones are refused with RESOURCE_EXHAUSTED."""

    max_in_flight: int = Field(default=64, ge=1)
    """Prompts of one request that are worked on at a time, so that one request does not fill the queue."""

    on_demand_objects: int = Field(default=ON_DEMAND_OBJECTS, ge=4)
    """Embeddings kept in the store for jobs with embedding_storage `on_demand`, of all encoders of this process; the
    oldest are deleted. A prompt is one object for each encoder."""

    idle_seconds: float = Field(default=0.0, ge=0)
    """After so long without work an encoder moves to host memory, until the next request; 0 never moves. On a CPU
    nothing moves."""

    @field_validator("encoders")
    @classmethod
    def _check_encoders(cls, encoders: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in encoders if name not in ENCODER_NAMES]
        if unknown or not encoders:
            raise ValueError(f"{','.join(unknown) or 'none'} given; use one or more of {','.join(ENCODER_NAMES)}")
        return tuple(dict.fromkeys(encoders))

    @field_validator("precision")
    @classmethod
    def _check_precision(cls, precision: tuple[str, ...]) -> tuple[str, ...]:
        is_for_all = len(precision) == 1 and "=" not in precision[0]
        for choice in precision:
            encoder, separator, name = choice.partition("=")
            if not is_for_all and (not separator or encoder not in ENCODER_NAMES):
                example = "t5=int8-quanto,llama=nf4-bnb"
                raise ValueError(
                    f"{choice!r} is not ENCODER=PRECISION with one of {','.join(ENCODER_NAMES)}; write {example}, or "
                    "one precision for all"
                )
            problem = refusal(choice if is_for_all else name, is_trained_on=False)
            if problem is not None:
                raise ValueError(problem)
        return precision

    @model_validator(mode="after")
    def _check_precisions(self) -> Self:
        for name in self.encoders:
            device_type = self.device_of(name).partition(":")[0]
            problem = refusal(self.precision_of(name), is_trained_on=False, device_type=device_type)
            if problem is not None:
                raise ValueError(f"precision of {name}: {problem}")
        return self

    def device_of(self, encoder: str) -> str:
        """Device of one encoder: its own, or that of all."""
        own: str | None = getattr(self, f"{encoder}_device")
        return own or self.device

    def precision_of(self, encoder: str) -> str:
        """Precision of one encoder: its own, or that of all."""
        if "=" not in self.precision[0]:
            return self.precision[0]
        chosen = dict(choice.split("=", 1) for choice in self.precision)
        return chosen.get(encoder, NO_CHANGE)

    def batch_limits(self) -> BatchLimits:
        """The micro-batchers' limits. Results are stored while the next batch runs, hence two batches' worth."""
        return BatchLimits(
            max_batch_size=self.max_batch_size,
            window_seconds=self.batch_window_seconds,
            max_waiting=self.max_waiting,
            max_held=2 * self.max_batch_size,
        )
