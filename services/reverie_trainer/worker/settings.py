"""Settings of the training process: what the trainer that starts it says about this machine. The job says the rest."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import CliSuppress, SettingsConfigDict
from reverie_common.settings import CommaSeparated, StoreSettings

GIB = 1024**3


class WorkerSettings(StoreSettings):
    """Settings of `python -m reverie_trainer.worker`."""

    model_config = SettingsConfigDict(env_prefix="REVERIE_WORKER_")

    secret_fields: ClassVar[frozenset[str]] = StoreSettings.secret_fields | {"token"}

    job_id: str = ""
    """The job to train; with --standby it is read from standard input."""

    token: CliSuppress[SecretStr] = SecretStr("")
    """Secret that the trainer gave to this worker; never a flag."""

    standby: bool = False
    """Import everything, then wait for one line `JOB_ID TOKEN` on standard input; its end means that none comes."""

    trainer: str = "127.0.0.1:50053"
    """The trainer, `host:port`."""

    sampler: str = ""
    """The sampler that draws validation pictures, `host:port`; empty draws none."""

    encoders: CommaSeparated = ()
    """Encoder services, HOST:PORT[,HOST:PORT], asked by jobs with embedding_storage `on_demand`."""

    encoder_patience_seconds: float = Field(default=600.0, ge=0)
    """How long an encoder service may be away before such a job fails."""

    checkpoint: str = Field(min_length=1)
    """The model: a directory, `s3://bucket/prefix`, or `organisation/name` on the Hub."""

    device: str = "auto"
    """torch device; `auto` is `cuda` where there is one, `cpu` elsewhere."""

    num_threads: int = Field(default=0, ge=0)
    """CPU threads that compute; 0 is one for each core."""

    data_threads: int = Field(default=2, ge=1, le=64)
    """Threads that read batches from the store."""

    prefetch_batches: int = Field(default=4, ge=1, le=1024)
    """Micro-batches to be ahead of the training."""

    cache_bytes: int = Field(default=4 * GIB, ge=0)
    """Memory for embeddings and latents that are used again; 34.6 MB for each distinct caption of the real model."""

    validation_wait_seconds: float = Field(default=120.0, ge=0)
    """After the last step, how long to wait for pictures since the sampler's last answer."""

    validation_retry_seconds: float = Field(default=600.0, ge=0)
    """How long the sampler may be away before pictures are given up."""

    trainer_patience_seconds: float = Field(default=600.0, ge=0)
    """How long the trainer may be away before the worker saves and ends."""

    report_interval_seconds: float = Field(default=0.5, gt=0, le=60)
    """Time between two reports."""

    metrics_host: str = "127.0.0.1"
    """Address that Prometheus /metrics listens on."""

    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Port of Prometheus /metrics; 0 takes any free one."""

    log_format: Literal["json", "console"] = "json"
    """`json` for machines, `console` for people."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is logged."""

    @model_validator(mode="after")
    def _need_a_job(self) -> WorkerSettings:
        if not self.standby and not self.job_id:
            raise ValueError("job_id is missing; give --job-id, or --standby to read it from standard input")
        return self
