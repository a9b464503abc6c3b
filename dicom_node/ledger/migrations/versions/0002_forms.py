"""Results come in forms; the node remembers what its peers take."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the form of a result, and the table of what peers accept."""
    op.add_column("result", sa.Column("form", sa.String(length=32), nullable=True))
    op.create_table(
        "acceptance",
        sa.Column("peer", sa.String(length=320), nullable=False),
        sa.Column("sop_class_uid", sa.String(length=64), nullable=False),
        sa.Column("transfer_syntax_uid", sa.String(length=64), nullable=False),
        sa.Column("accepted", sa.Boolean(), nullable=False),
        sa.Column("asked_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("peer", "sop_class_uid", "transfer_syntax_uid", name=op.f("pk_acceptance")),
    )
