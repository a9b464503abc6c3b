"""Priority: what is more urgent is run first, and how often a job has given way."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add two columns to the jobs, and find what is due by priority."""
    op.add_column("job", sa.Column("priority", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("job", sa.Column("yielded", sa.Integer(), nullable=False, server_default="0"))
    op.drop_index("ix_job_due", table_name="job")
    op.create_index("ix_job_due", "job", ["state", "kind", "priority", "not_before"])
