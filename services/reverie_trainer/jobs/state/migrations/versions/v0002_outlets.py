"""How far each job's history has been told to whom."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    op.create_table(
        "outlets",
        sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.job_id"), primary_key=True),
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("is_done", sa.Boolean(), nullable=False, index=True),
    )


def downgrade() -> None:
    """Take the revision back."""
    op.drop_table("outlets")
