"""Settings of the trainer service: `REVERIE_TRAINER_<FIELD>` or `--field`; the store's are `REVERIE_STORE_<FIELD>`."""

import os
from pathlib import Path
from typing import ClassVar

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import SettingsConfigDict
from reverie_common.settings import CommaSeparated, ServerSettings, StoreSettings


def _default_state_dir() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "reverie" / "trainer"


class TrainerSettings(ServerSettings, StoreSettings):
    """Where jobs are kept, whom preparation asks, and how workers are started."""

    model_config = SettingsConfigDict(env_prefix="REVERIE_TRAINER_")

    secret_fields: ClassVar[frozenset[str]] = StoreSettings.secret_fields | {"database_url"}

    port: int = Field(default=50053, ge=0, le=65535)
    """gRPC port; 0 takes any free one."""

    metrics_port: int = Field(default=9103, ge=0, le=65535)
    """Port of Prometheus /metrics; 0 takes any free one."""

    encoders: CommaSeparated = ("127.0.0.1:50051",)
    """Addresses of encoder services, HOST:PORT[,HOST:PORT]; together they must hold all four encoders."""

    vae: str = "127.0.0.1:50052"
    """Address of the VAE service."""

    sampler: str = "127.0.0.1:50054"
    """Address of the sampler service, handed to workers."""

    checkpoint: str
    """HiDream checkpoint: a local directory, an s3:// prefix of the store, or a Hub id; the services use the same."""

    source_buckets: CommaSeparated = ()
    """Other buckets of the store's server that datasets may be imported from, BUCKET[,BUCKET]; the VAE service needs
    the same setting."""

    source_hosts: CommaSeparated = ()
    """Hosts that images may be imported from by https, HOST[:PORT][,HOST[:PORT]]. A private address must be listed
    itself; http is only for loopback addresses."""

    state_dir: Path = Field(default_factory=_default_state_dir)
    """Directory of the SQLite database and the workers' logs."""

    database_url: SecretStr | None = None
    """SQLAlchemy URL of the database, only from the environment; by default SQLite in state_dir."""

    secrets_dir: Path | None = None
    """Directory of secrets that jobs may name, a file each: webhook URLs and keys, `hf_token`, `wandb_api_key`."""

    webhook_hosts: CommaSeparated = ()
    """Hosts that jobs' webhooks may go to, HOST[,HOST]; by default none."""

    tracking_dir: Path | None = None
    """Directory of TensorBoard's and Weights & Biases' files, one in it for each job; by default in state_dir."""

    hub_endpoint: str | None = None
    """URL of the Hugging Face Hub to publish to; by default HF_ENDPOINT, or the Hub itself."""

    max_concurrent_jobs: int = Field(default=1, ge=1, le=64)
    """Jobs that are prepared or trained at a time; others wait."""

    standby_workers: int = Field(default=1, ge=0, le=8)
    """Workers that are kept warm while there is room for a job, so that it begins at once."""

    worker_module: str = "reverie_trainer.worker"
    """Python module that is started as the worker."""

    trainer_address: str | None = None
    """HOST:PORT under which workers reach this trainer; by default its own host and port."""

    patience_seconds: float = Field(default=600.0, ge=0)
    """How long preparation waits for a service that is away or full before the job fails; workers wait for the store
    as long."""

    progress_seconds: float = Field(default=0.25, ge=0)
    """Preparation tells its progress at most this often."""

    lease_seconds: float = Field(default=60.0, gt=0)
    """Without a report for so long, a worker is taken for dead and another one is started."""

    worker_start_seconds: float = Field(default=600.0, gt=0)
    """A worker that has not leased its job after so long is taken for dead."""

    worker_stop_seconds: float = Field(default=60.0, gt=0)
    """A worker that was told to save and stop is killed after so long; what it has saved stays."""

    max_starts_without_progress: int = Field(default=3, ge=1)
    """After so many worker starts without a further step a job fails."""

    tick_seconds: float = Field(default=0.5, gt=0)
    """Workers and leases are looked at this often."""

    @field_validator("encoders")
    @classmethod
    def _require_addresses(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        if not addresses:
            raise ValueError("no address is given; name at least one encoder service, HOST:PORT")
        return addresses
