"""What is asked again and again costs the same, however much the ledger holds."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Let a series know how many bytes it has; index jobs by kind, and those that are still to do."""
    op.add_column("series", sa.Column("bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute(
        "UPDATE series SET bytes = (SELECT COALESCE(SUM(instance.size), 0) FROM instance"
        " WHERE instance.series_instance_uid = series.series_instance_uid)"
    )
    op.drop_index("ix_job_due", table_name="job")
    op.create_index("ix_job_due", "job", ["state", "kind", "not_before"])
    to_do = sa.text("ended_at IS NULL")
    op.create_index("ix_job_to_do", "job", ["job_id"], sqlite_where=to_do, postgresql_where=to_do)
