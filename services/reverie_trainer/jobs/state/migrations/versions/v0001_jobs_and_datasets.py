"""The first tables: jobs, their events, checkpoints and artifacts, datasets, and requests."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    _create_jobs()
    _create_parts("checkpoints", sa.Column("step", sa.Integer(), primary_key=True))
    _create_parts("artifacts", sa.Column("path", sa.String(255), primary_key=True))
    _create_events()
    _create_datasets_and_requests()


def downgrade() -> None:
    """Take the revision back."""
    for table in ("requests", "datasets", "events", "artifacts", "checkpoints", "jobs"):
        op.drop_table(table)


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("job_id", sa.String(32), nullable=False, unique=True),
        sa.Column("state", sa.Integer(), nullable=False, index=True),
        sa.Column("spec", sa.LargeBinary(), nullable=False),
        sa.Column("record", sa.LargeBinary(), nullable=False),
        sa.Column("preparation", sa.LargeBinary()),
        sa.Column("prepared", sa.LargeBinary()),
        sa.Column("dataset_versions", sa.JSON(), nullable=False),
        sa.Column("last_sequence", sa.BigInteger(), nullable=False),
        sa.Column("cancel_time", sa.Float()),
        sa.Column("lease_id", sa.String(64), unique=True),
        sa.Column("worker_id", sa.String(255)),
        sa.Column("report_sequence", sa.BigInteger(), nullable=False),
        sa.Column("token_digest", sa.String(64)),
        sa.Column("worker_process", sa.JSON()),
        sa.Column("launch_time", sa.Float()),
        sa.Column("starts_without_progress", sa.Integer(), nullable=False),
        sa.Column("furthest_step", sa.Integer(), nullable=False),
    )


def _create_parts(table: str, key: sa.Column[Any]) -> None:
    op.create_table(
        table,
        sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.job_id"), primary_key=True),
        key,
        sa.Column("body", sa.LargeBinary(), nullable=False),
    )


def _create_events() -> None:
    op.create_table(
        "events",
        sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.job_id"), primary_key=True),
        sa.Column("sequence", sa.BigInteger(), primary_key=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
    )
    op.create_index("ix_events_job_kind", "events", ["job_id", "kind"])


def _create_datasets_and_requests() -> None:
    op.create_table(
        "datasets",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("num_samples", sa.Integer(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "requests",
        sa.Column("method", sa.String(32), primary_key=True),
        sa.Column("request_id", sa.String(36), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("resource", sa.String(63), nullable=False),
        sa.Column("time", sa.Float(), nullable=False),
    )
