"""The tables. Times are seconds since the epoch; identity of patients is in none of them."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)
_UID = String(64)
_Identity = BigInteger().with_variant(Integer, "sqlite")

series = Table(
    "series",
    metadata,
    Column("series_instance_uid", _UID, primary_key=True),
    Column("study_instance_uid", _UID, nullable=False, index=True),
    Column("modality", String(16), nullable=False),
    Column("calling_ae_title", String(16), nullable=False),
    Column("is_own_result", Boolean, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("complete_revision", Integer, nullable=False),  # the last revision that was found complete; 0: none
    Column("received", Integer, nullable=False),  # instances
    Column("bytes", BigInteger, nullable=False, server_default="0"),  # of their files
    Column("announced", Integer),
    Column("last_activity", Double, nullable=False),
    Column("released", Boolean, nullable=False),  # the last association that sent some of it was released
    Column("promised_at", Double),  # the node last promised to keep some of it (PS3.4 Annex J)
)

_incomplete = series.c.complete_revision < series.c.revision
Index("ix_series_incomplete", series.c.last_activity, sqlite_where=_incomplete, postgresql_where=_incomplete)

instance = Table(
    "instance",
    metadata,
    Column("sop_instance_uid", _UID, primary_key=True),
    Column("sop_class_uid", _UID, nullable=False),
    Column("series_instance_uid", ForeignKey("series.series_instance_uid"), nullable=False, index=True),
    Column("transfer_syntax_uid", _UID, nullable=False),
    Column("number_of_frames", Integer, nullable=False),
    Column("place", JSON),  # [[6 numbers], [3 numbers]]: orientation and position, mm
    Column("path", Text, nullable=False),  # relative to the storage folder
    Column("digest", String(64), nullable=False),  # of the dataset as received, hex
    Column("size", BigInteger, nullable=False),  # bytes
    Column("received_at", Double, nullable=False),
)

holding = Table(
    "holding",
    metadata,
    # an open association and a series that it has sent some of: the series cannot be complete
    Column("association_id", String(64), primary_key=True),
    Column("series_instance_uid", _UID, primary_key=True),
    Column("node_id", String(64), nullable=False, index=True),
)

job = Table(
    "job",
    metadata,
    Column("job_id", _Identity, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("key", String(255), nullable=False, unique=True),
    Column("state", String(16), nullable=False),
    Column("series_instance_uid", ForeignKey("series.series_instance_uid"), nullable=False, index=True),
    Column("revision", Integer, nullable=False),
    Column("model", String(32), nullable=False),
    Column("routes", JSON, nullable=False),
    Column("send_to", JSON, nullable=False),
    Column("priority", Integer, nullable=False, server_default="1"),  # see `routing.Priority`: less is more urgent
    Column("yielded", Integer, nullable=False, server_default="0"),  # how often it was interrupted by a more urgent one
    Column("parent_id", ForeignKey("job.job_id"), index=True),  # of a delivery: the inference whose results it sends
    Column("peer", String(32)),
    Column("attempts", Integer, nullable=False),
    Column("not_before", Double, nullable=False),
    Column("hinted_at", Double),
    Column("worker", String(128)),
    Column("lease_token", String(32)),
    Column("lease_until", Double),
    Column("progress", Double, nullable=False),  # 0..1
    Column("reason", String(64)),
    Column("detail", Text),
    Column("created_at", Double, nullable=False),
    Column("wanted_since", Double, nullable=False),  # made, or last requeued by the operator
    Column("started_at", Double),
    Column("ended_at", Double),
    Index("ix_job_due", "state", "kind", "priority", "not_before"),
)
_to_do = job.c.ended_at.is_(None)
Index("ix_job_to_do", job.c.job_id, sqlite_where=_to_do, postgresql_where=_to_do)

result = Table(
    "result",
    metadata,
    Column("sop_instance_uid", _UID, primary_key=True),
    Column("job_id", ForeignKey("job.job_id"), nullable=False, index=True),
    Column("kind", String(16), nullable=False),
    Column("form", String(32)),  # which set of results it belongs to; null: to every one
    Column("sop_class_uid", _UID, nullable=False),
    Column("series_instance_uid", _UID, nullable=False),
    Column("study_instance_uid", _UID, nullable=False),
    Column("transfer_syntax_uid", _UID, nullable=False),
    Column("path", Text, nullable=False),
    Column("sha256", String(64), nullable=False),  # of the file
    Column("size", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    UniqueConstraint("job_id", "kind", "sop_instance_uid"),
)

commitment = Table(
    "commitment",
    metadata,
    # what a peer that commits has said about each result that it was sent (PS3.4 Annex J, the node as SCU)
    Column("job_id", ForeignKey("job.job_id"), primary_key=True),
    Column("sop_instance_uid", _UID, primary_key=True),
    Column("transaction_uid", _UID, nullable=False, index=True),
    Column("state", String(16), nullable=False),  # see `ledger.commitments.Answer`
    Column("failure_reason", Integer),
    Column("asked_at", Double, nullable=False),
)

commitment_request = Table(
    "commitment_request",
    metadata,
    # what the node was asked to commit (PS3.4 Annex J, the node as SCP), until its report has been taken
    Column("request_id", _Identity, primary_key=True),
    Column("transaction_uid", _UID, nullable=False),
    Column("calling_ae_title", String(16), nullable=False),
    Column("references", JSON, nullable=False),  # [[SOP Class UID, SOP Instance UID], ...]
    Column("asked_at", Double, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("not_before", Double, nullable=False),
    Column("ended_at", Double),  # taken, or given up
    UniqueConstraint("calling_ae_title", "transaction_uid"),
)
_unanswered = commitment_request.c.ended_at.is_(None)
Index(
    "ix_commitment_request_due",
    commitment_request.c.not_before,
    sqlite_where=_unanswered,
    postgresql_where=_unanswered,
)

deletion = Table(
    "deletion",
    metadata,
    # a study whose rows are gone and whose files are about to go
    Column("deletion_id", String(32), primary_key=True),  # the name of the folder that they were moved to
    Column("node_id", String(64), nullable=False, index=True),
    Column("study_instance_uid", _UID, nullable=False),
    Column("ground", String(16), nullable=False),  # see `retention.Ground`
    Column("sop_classes", JSON, nullable=False),  # how many instances and results of each SOP Class UID
)

acceptance = Table(
    "acceptance",
    metadata,
    # what a peer answered when a presentation context was proposed to it, the last time
    Column("peer", String(320), primary_key=True),  # AETITLE@HOST:PORT
    Column("sop_class_uid", _UID, primary_key=True),
    Column("transfer_syntax_uid", _UID, primary_key=True),
    Column("accepted", Boolean, nullable=False),
    Column("asked_at", Double, nullable=False),
)

event = Table(
    "event",
    metadata,
    # append-only: every change of state, written in the transaction that makes it
    Column("event_id", _Identity, primary_key=True),
    Column("at", Double, nullable=False),
    Column("name", String(64), nullable=False),
    Column("study_instance_uid", _UID, index=True),
    Column("series_instance_uid", _UID),
    Column("job_id", _Identity, index=True),
    Column("fields", JSON, nullable=False),
)

home = Table(
    "home",
    metadata,
    # one row: which storage folder the paths of this ledger are in
    Column("one", Integer, primary_key=True, autoincrement=False),
    Column("storage_id", String(64), nullable=False),
)
