"""Digest: what vouches for a received data set need not be a SHA-256."""

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Rename the column, on the spot: ten million rows stay where they are."""
    op.execute("ALTER TABLE instance RENAME COLUMN sha256 TO digest")
