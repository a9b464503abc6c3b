"""Home: which storage folder the ledger is about."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Add a table of one row; the node that starts next writes it."""
    op.create_table(
        "home",
        sa.Column("one", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("storage_id", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("one", name=op.f("pk_home")),
    )
