"""Retention: which series the node has promised to keep, and deletions whose files are still to go."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_AT_ONCE = 500


def upgrade() -> None:
    """Add both, and mark whatever storage commitment was ever asked for as promised."""
    op.add_column("series", sa.Column("promised_at", sa.Double(), nullable=True))
    op.create_table(
        "deletion",
        sa.Column("deletion_id", sa.String(length=32), nullable=False),
        sa.Column("node_id", sa.String(length=64), nullable=False),
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("ground", sa.String(length=16), nullable=False),
        sa.Column("sop_classes", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("deletion_id", name=op.f("pk_deletion")),
    )
    op.create_index(op.f("ix_deletion_node_id"), "deletion", ["node_id"], unique=False)
    _promise()


def _promise() -> None:
    """Which of the answers said yes was not recorded: whatever was asked about counts as promised."""
    connection = op.get_bind()
    request = sa.table("commitment_request", sa.column("references", sa.JSON()), sa.column("asked_at"))
    for references, asked_at in connection.execute(sa.select(request).order_by(request.c.asked_at)).all():
        uids = [uid for _, uid in references]
        for start in range(0, len(uids), _AT_ONCE):
            _mark(connection, uids[start : start + _AT_ONCE], asked_at)


def _mark(connection: sa.Connection, uids: Sequence[str], at: float) -> None:
    series = sa.table("series", sa.column("series_instance_uid"), sa.column("promised_at"))
    instance = sa.table("instance", sa.column("series_instance_uid"), sa.column("sop_instance_uid"))
    theirs = sa.select(instance.c.series_instance_uid).where(instance.c.sop_instance_uid.in_(uids))
    connection.execute(sa.update(series).where(series.c.series_instance_uid.in_(theirs)).values(promised_at=at))
