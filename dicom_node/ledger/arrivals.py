"""What arrived: instances, the series they make up, and the associations that hold a series open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, exists, func, select, update

from dicom_node.entities import AssociationIdentity, Instance, SlicePlace
from dicom_node.ledger.database import Database
from dicom_node.ledger.journal import Subject, write_event
from dicom_node.ledger.schema import holding, instance, series
from dicom_node.services import Use, use_of


@dataclass(frozen=True, slots=True)
class OpenSeries:
    """A series whose present revision has not been found complete yet."""

    series_instance_uid: str
    study_instance_uid: str
    revision: int
    received: int
    announced: int | None
    last_activity: float
    released: bool
    held_open: bool
    calling_ae_title: str
    is_own_result: bool


@dataclass(frozen=True, slots=True)
class Held:
    """What the ledger knows of a SOP Instance UID that comes again."""

    sha256: str
    series_is_open: bool


@dataclass(frozen=True, slots=True)
class StoredInstance:
    """One instance of a series, as the ledger has it."""

    sop_instance_uid: str
    sop_class_uid: str
    path: str
    sha256: str
    place: SlicePlace | None


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A study that an association was sending when the node died, and how many instances its series hold."""

    study_instance_uid: str
    calling_ae_title: str
    received: int


class Arrivals:
    """Facts about what was received."""

    def __init__(self, database: Database) -> None:
        """Use `database`."""
        self._database = database

    def held(self, sop_instance_uid: str) -> Held | None:
        """Return what is held under a SOP Instance UID, or None."""
        query = (
            select(instance.c.sha256, (series.c.complete_revision < series.c.revision).label("is_open"))
            .join_from(instance, series)
            .where(instance.c.sop_instance_uid == sop_instance_uid)
        )
        with self._database.reading() as connection:
            row = connection.execute(query).one_or_none()
            return None if row is None else Held(row.sha256, bool(row.is_open))

    def hold(self, series_instance_uid: str, association: AssociationIdentity, *, node_id: str) -> None:
        """Let an association hold a series open, though what it sends is here already: its release is evidence."""
        with self._database.writing() as connection:
            self._hold(connection, series_instance_uid, association, node_id)

    def record(self, received: Instance, association: AssociationIdentity, *, node_id: str, now: float) -> None:
        """Record one instance; the first opens its series, one that comes after completion reopens it."""
        header = received.header
        with self._database.writing() as connection:
            revision = self._open_series(connection, received, association, now)
            connection.execute(
                instance.insert().values(
                    sop_instance_uid=header.sop_instance_uid,
                    sop_class_uid=header.sop_class_uid,
                    series_instance_uid=header.series_instance_uid,
                    transfer_syntax_uid=received.transfer_syntax_uid,
                    number_of_frames=header.number_of_frames,
                    place=_place_out(header.place),
                    path=received.path,
                    sha256=received.sha256,
                    size=received.size,
                    received_at=now,
                )
            )
            connection.execute(
                update(series)
                .where(series.c.series_instance_uid == header.series_instance_uid)
                .values(
                    revision=revision,
                    received=series.c.received + 1,
                    bytes=series.c.bytes + received.size,
                    announced=func.coalesce(header.announced, series.c.announced),
                    last_activity=now,
                    released=False,
                )
            )
            self._hold(connection, header.series_instance_uid, association, node_id)

    def _open_series(
        self, connection: Connection, received: Instance, association: AssociationIdentity, now: float
    ) -> int:
        """Make the series' row where there is none; return the revision that the new instance belongs to."""
        header = received.header
        made = connection.execute(
            self._database.insert(series)
            .values(
                series_instance_uid=header.series_instance_uid,
                study_instance_uid=header.study_instance_uid,
                modality=header.modality,
                calling_ae_title=association.calling_ae_title,
                is_own_result=header.is_own_result,
                revision=1,
                complete_revision=0,
                received=0,
                last_activity=now,
                released=False,
            )
            .on_conflict_do_nothing()
            .returning(series.c.series_instance_uid)  # the count of rows is -1 on PostgreSQL, where it says nothing
        ).scalar()
        subject = Subject(header.study_instance_uid, header.series_instance_uid)
        if made is not None:
            write_event(connection, "series.opened", now, subject, modality=header.modality)
            return 1
        query = select(series.c.revision, series.c.complete_revision)
        query = query.where(series.c.series_instance_uid == header.series_instance_uid).with_for_update()
        revision, complete = connection.execute(query).one()
        if complete < revision or use_of(header.sop_class_uid) is Use.KEPT:
            # what is no image changes nothing that a model sees: the same input must not be run again
            return int(revision)
        write_event(connection, "series.reopened", now, subject, revision=revision + 1)
        return int(revision) + 1

    def _hold(
        self, connection: Connection, series_instance_uid: str, association: AssociationIdentity, node_id: str
    ) -> None:
        values = {
            "association_id": association.association_id,
            "series_instance_uid": series_instance_uid,
            "node_id": node_id,
        }
        connection.execute(self._database.insert(holding).values(values).on_conflict_do_nothing())

    def association_ended(self, association_id: str, *, released: bool, now: float) -> None:
        """Let go of every series that the association held; `released` says that it ended as it should."""
        mine = select(holding.c.series_instance_uid).where(holding.c.association_id == association_id)
        with self._database.writing() as connection:
            connection.execute(
                update(series)
                .where(series.c.series_instance_uid.in_(mine))
                .values(released=released, last_activity=now)
            )
            connection.execute(delete(holding).where(holding.c.association_id == association_id))

    def interrupted(self, node_id: str) -> list[Interrupted]:
        """Return what associations of an earlier life of this node were sending when it died."""
        theirs = select(holding.c.series_instance_uid).where(holding.c.node_id == node_id)
        keys = series.c.study_instance_uid, series.c.calling_ae_title
        query = select(*keys, func.sum(series.c.received)).where(series.c.series_instance_uid.in_(theirs))
        with self._database.reading() as connection:
            return [Interrupted(*row) for row in connection.execute(query.group_by(*keys).order_by(*keys))]

    def forget_associations_of(self, node_id: str, *, now: float) -> None:
        """Let go of what associations of an earlier life of this node held: they died with it.

        The silence while the node was down says nothing; the quiet period of what they sent begins now.
        """
        theirs = select(holding.c.series_instance_uid).where(holding.c.node_id == node_id)
        with self._database.writing() as connection:
            connection.execute(
                update(series).where(series.c.series_instance_uid.in_(theirs)).values(released=False, last_activity=now)
            )
            connection.execute(delete(holding).where(holding.c.node_id == node_id))

    def open_series(self) -> list[OpenSeries]:
        """Return every series whose present revision is not complete, the longest silent first."""
        held = exists().where(holding.c.series_instance_uid == series.c.series_instance_uid)
        query = (
            select(series, held.label("held_open"))
            .where(series.c.complete_revision < series.c.revision)
            .order_by(series.c.last_activity)
        )
        with self._database.reading() as connection:
            return [_open_series(row) for row in connection.execute(query).mappings()]

    def complete_series_of(self, study_instance_uid: str) -> list[str]:
        """Return the Series Instance UIDs of a study that are complete and none of the node's own results."""
        query = select(series.c.series_instance_uid).where(
            (series.c.study_instance_uid == study_instance_uid)
            & (series.c.complete_revision == series.c.revision)
            & ~series.c.is_own_result
        )
        with self._database.reading() as connection:
            return list(connection.execute(query.order_by(series.c.series_instance_uid)).scalars())

    def instances_of(self, series_instance_uid: str) -> list[StoredInstance]:
        """Return the instances of a series in the order of their UIDs."""
        query = (
            select(instance)
            .where(instance.c.series_instance_uid == series_instance_uid)
            .order_by(instance.c.sop_instance_uid)
        )
        with self._database.reading() as connection:
            return [_stored_instance(row) for row in connection.execute(query).mappings()]


def _open_series(row: Any) -> OpenSeries:
    return OpenSeries(**{name: row[name] for name in OpenSeries.__slots__})


def _stored_instance(row: Any) -> StoredInstance:
    return StoredInstance(
        sop_instance_uid=row["sop_instance_uid"],
        sop_class_uid=row["sop_class_uid"],
        path=row["path"],
        sha256=row["sha256"],
        place=_place_in(row["place"]),
    )


def _place_out(place: SlicePlace | None) -> list[Sequence[float]] | None:
    return None if place is None else [place.image_orientation_patient, place.image_position_patient]


def _place_in(value: Any) -> SlicePlace | None:
    return None if value is None else SlicePlace(tuple(value[0]), tuple(value[1]))
