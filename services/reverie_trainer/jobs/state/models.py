"""The tables. Nothing here is particular to one database.

What the contract already describes is kept as serialised messages of the contract (`TrainingJob`, `TrainingJobEvent`),
so that a new field of the contract needs no migration; what is searched, ordered or compared has a column.
"""

from sqlalchemy import JSON, BigInteger, Boolean, Float, ForeignKey, Index, Integer, LargeBinary, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Base of all tables."""


class JobRow(Base):
    """One training job."""

    __tablename__ = "jobs"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    """Order of acceptance."""
    job_id: Mapped[str] = mapped_column(String(32), unique=True)
    state: Mapped[int] = mapped_column(Integer, index=True)
    """TrainingJobState."""
    spec: Mapped[bytes] = mapped_column(LargeBinary)
    """TrainingJobSpec with every default; never changes."""
    record: Mapped[bytes] = mapped_column(LargeBinary)
    """TrainingJob without spec and preparation; written with every step, so it is kept small."""
    preparation: Mapped[bytes | None] = mapped_column(LargeBinary)
    """PreparationReport."""
    prepared: Mapped[bytes | None] = mapped_column(LargeBinary)
    """ObjectRef of the manifest of prepared samples."""
    dataset_versions: Mapped[dict[str, str]] = mapped_column(JSON)
    """Version of each dataset when the job was accepted: what it trains on, whatever happens to the dataset."""
    last_sequence: Mapped[int] = mapped_column(BigInteger, default=0)
    cancel_time: Mapped[float | None] = mapped_column(Float)
    """Unix time at which somebody cancelled it."""
    lease_id: Mapped[str | None] = mapped_column(String(64), unique=True)
    worker_id: Mapped[str | None] = mapped_column(String(255))
    report_sequence: Mapped[int] = mapped_column(BigInteger, default=0)
    """Newest report of the lease that was recorded."""
    token_digest: Mapped[str | None] = mapped_column(String(64))
    """sha256 of the secret of the worker that was started last."""
    worker_process: Mapped[dict[str, str] | None] = mapped_column(JSON(none_as_null=True))
    """How the launcher finds that worker again after a restart of the trainer."""
    launch_time: Mapped[float | None] = mapped_column(Float)
    """Unix time at which that worker was started."""
    starts_without_progress: Mapped[int] = mapped_column(Integer, default=0)
    furthest_step: Mapped[int] = mapped_column(Integer, default=0)
    """The highest step ever reported; only going beyond it counts as progress."""


class EventRow(Base):
    """One event in a job's history."""

    __tablename__ = "events"
    __table_args__ = (Index("ix_events_job_kind", "job_id", "kind"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    kind: Mapped[str] = mapped_column(String(32))
    """Name of the payload's field."""
    body: Mapped[bytes] = mapped_column(LargeBinary)
    """TrainingJobEvent."""


class CheckpointRow(Base):
    """One checkpoint that a job can be resumed from."""

    __tablename__ = "checkpoints"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    step: Mapped[int] = mapped_column(Integer, primary_key=True)
    body: Mapped[bytes] = mapped_column(LargeBinary)
    """Checkpoint."""


class ArtifactRow(Base):
    """One file that a job made."""

    __tablename__ = "artifacts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    path: Mapped[str] = mapped_column(String(255), primary_key=True)
    body: Mapped[bytes] = mapped_column(LargeBinary)
    """ObjectRef."""


class OutletRow(Base):
    """How far a job's history has been told to one of its outlets."""

    __tablename__ = "outlets"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    """`tensorboard`, `wandb`, `hub` or `webhook-<index>`."""
    sequence: Mapped[int] = mapped_column(BigInteger, default=0)
    """The last event that was told."""
    is_done: Mapped[bool] = mapped_column(Boolean, default=False, index=True)
    """Whether everything was told of a job that rests."""


class DatasetRow(Base):
    """One dataset: a name for the newest version of its manifest in the store."""

    __tablename__ = "datasets"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    version: Mapped[str] = mapped_column(String(64))
    num_samples: Mapped[int] = mapped_column(Integer)
    size_bytes: Mapped[int] = mapped_column(BigInteger)


class RequestRow(Base):
    """One mutation that was carried out, so that a repetition of it is recognised."""

    __tablename__ = "requests"

    method: Mapped[str] = mapped_column(String(32), primary_key=True)
    request_id: Mapped[str] = mapped_column(String(36), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    """sha256 of the request."""
    resource: Mapped[str] = mapped_column(String(63))
    """The job or dataset that it was carried out on."""
    time: Mapped[float] = mapped_column(Float)
    """Unix time."""
