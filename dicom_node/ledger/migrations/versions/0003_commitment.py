"""Storage commitment: what peers have promised us, and what we were asked to promise."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add a table for each role."""
    op.create_table(
        "commitment",
        sa.Column("job_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("sop_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("transaction_uid", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("failure_reason", sa.Integer(), nullable=True),
        sa.Column("asked_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.job_id"], name=op.f("fk_commitment_job_id")),
        sa.PrimaryKeyConstraint("job_id", "sop_instance_uid", name=op.f("pk_commitment")),
    )
    op.create_index(op.f("ix_commitment_transaction_uid"), "commitment", ["transaction_uid"], unique=False)
    op.create_table(
        "commitment_request",
        sa.Column("request_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("transaction_uid", sa.String(length=64), nullable=False),
        sa.Column("calling_ae_title", sa.String(length=16), nullable=False),
        sa.Column("references", sa.JSON(), nullable=False),
        sa.Column("asked_at", sa.Double(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("not_before", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("request_id", name=op.f("pk_commitment_request")),
        sa.UniqueConstraint(
            "calling_ae_title",
            "transaction_uid",
            name=op.f("uq_commitment_request_calling_ae_title_transaction_uid"),
        ),
    )
    unanswered = sa.text("ended_at IS NULL")
    op.create_index(
        "ix_commitment_request_due",
        "commitment_request",
        ["not_before"],
        unique=False,
        sqlite_where=unanswered,
        postgresql_where=unanswered,
    )
