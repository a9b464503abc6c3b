"""What arrived: instances, the series they make up, and the associations that hold a series open."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, Connection, Integer, bindparam, delete, exists, func, select, update

from dicom_node.entities import AssociationIdentity, Header, Instance, SlicePlace
from dicom_node.errors import LedgerUnavailable
from dicom_node.ledger.database import Database
from dicom_node.ledger.journal import Subject, write_event
from dicom_node.ledger.schema import holding, instance, series
from dicom_node.services import Use, modality_term, use_of


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

    digest: str
    path: str


class StoredInstance(NamedTuple):
    """One instance of a series, as the ledger has it."""

    sop_instance_uid: str
    sop_class_uid: str
    path: str
    digest: str
    place: SlicePlace | None


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A study that an association was sending when the node died, and how many instances its series hold."""

    study_instance_uid: str
    calling_ae_title: str
    received: int


Received = tuple[Instance, AssociationIdentity, float]
"""An instance, the association that it came on, and when, in seconds since the epoch."""


class AssociationEnd(NamedTuple):
    """The end of an association that may hold series open."""

    association: str  # its association_id
    is_released: bool  # it ended as it should
    at: float


# statements that every group of instances, or every association, needs are made once
_HELD = select(instance.c.sop_instance_uid, instance.c.digest, instance.c.path).where(
    instance.c.sop_instance_uid.in_(bindparam("uids", expanding=True))
)
_HELD_BY_IT = holding.c.association_id == bindparam("association")
_HOLDS_NO_MORE = delete(holding).where(_HELD_BY_IT)
_LET_GO = (
    update(series)
    .where(series.c.series_instance_uid.in_(select(holding.c.series_instance_uid).where(_HELD_BY_IT)))
    .values(released=bindparam("is_released"), last_activity=bindparam("at"))
)
_IS_IT = series.c.series_instance_uid == bindparam("uid")
_REVISIONS = select(series.c.revision, series.c.complete_revision).where(_IS_IT).with_for_update()
_GROW = (
    update(series)
    .where(_IS_IT)
    .values(
        revision=bindparam("present"),
        received=series.c.received + bindparam("more", type_=Integer),
        bytes=series.c.bytes + bindparam("more_bytes", type_=BigInteger),
        announced=func.coalesce(bindparam("says", type_=Integer), series.c.announced),
        last_activity=bindparam("at"),
        released=False,
    )
)

_INSTANCES = (
    select(*(instance.c[name] for name in StoredInstance._fields))
    .where(instance.c.series_instance_uid == bindparam("uid"))
    .order_by(instance.c.sop_instance_uid)
)

# asked twice a second, by a node that has nothing to do as well
_OPEN_SERIES = (
    select(
        *(series.c[name] for name in OpenSeries.__slots__ if name != "held_open"),
        exists().where(holding.c.series_instance_uid == series.c.series_instance_uid).label("held_open"),
    )
    .where(series.c.complete_revision < series.c.revision)
    .order_by(series.c.last_activity)
)


class Arrivals:
    """Facts about what was received."""

    def __init__(self, database: Database) -> None:
        """Use `database`."""
        self._database = database
        # the count of rows is -1 on PostgreSQL, where it says nothing of whether there was one
        made = series.c.series_instance_uid
        self._make_series = database.insert(series).on_conflict_do_nothing().returning(made)
        self._hold_series = database.insert(holding).on_conflict_do_nothing()

    def held(self, sop_instance_uids: Sequence[str]) -> dict[str, Held]:
        """Return what is held, by SOP Instance UID."""
        with self._database.reading() as connection:
            rows = connection.execute(_HELD, {"uids": sop_instance_uids})
            return {uid: Held(digest, path) for uid, digest, path in rows}

    def record(
        self,
        received: Sequence[Received],
        again: Sequence[tuple[Header, AssociationIdentity]] = (),
        aside: Sequence[tuple[Subject, str]] = (),
        *,
        node_id: str,
        now: float,
    ) -> None:
        """Record a group in one transaction; what comes after the completion of its series reopens it.

        `again` is what was here already: the association that sent it holds its series as well, for its release is
        evidence, and so that no retention deletes the series meanwhile. `aside` is the subject and the path of what
        was quarantined. Raises LedgerUnavailable where something of `again` was deleted since it was looked up.
        """
        # in one order everywhere: two nodes that record the same two series must not wait for each other
        by_series = sorted(received, key=lambda each: each[0].header.series_instance_uid)
        with self._database.writing() as connection:
            for series_uid, group in groupby(by_series, key=lambda each: each[0].header.series_instance_uid):
                self._record_series(connection, series_uid, list(group))
            _require_there(connection, {header.sop_instance_uid for header, _ in again} - _uids(received))
            holds = [*((each.header, association) for each, association, _ in by_series), *again]
            self._hold(connection, [(header.series_instance_uid, by) for header, by in holds], node_id)
            for subject, path in aside:
                write_event(connection, "instance.quarantined", now, subject, path=path)

    def _record_series(self, connection: Connection, series_uid: str, group: Sequence[Received]) -> None:
        latest = max(at for _, _, at in group)
        revision = self._open_series(connection, group, latest)
        self._database.insert_rows(connection, instance, _COLUMNS, [_row(each, at) for each, _, at in group])
        announced = [each.header.announced for each, _, _ in group if each.header.announced is not None]
        more = {"more": len(group), "more_bytes": sum(each.size for each, _, _ in group)}
        says = announced[-1] if announced else None
        connection.execute(_GROW, {"uid": series_uid, "present": revision, "says": says, "at": latest, **more})

    def _open_series(self, connection: Connection, group: Sequence[Received], now: float) -> int:
        """Make the series' row where there is none; return the revision that the new instances belong to."""
        received, association, _ = group[0]
        header = received.header
        values = {
            "series_instance_uid": header.series_instance_uid,
            "study_instance_uid": header.study_instance_uid,
            "modality": modality_term(header.modality),
            "calling_ae_title": association.calling_ae_title,
            "is_own_result": header.is_own_result,
            "revision": 1,
            "complete_revision": 0,
            "received": 0,
            "last_activity": now,
            "released": False,
        }
        made = connection.execute(self._make_series, values).scalar()
        subject = Subject(header.study_instance_uid, header.series_instance_uid)
        if made is not None:
            write_event(connection, "series.opened", now, subject, modality=modality_term(header.modality))
            return 1
        revision, complete = connection.execute(_REVISIONS, {"uid": header.series_instance_uid}).one()
        if complete < revision or all(use_of(each.header.sop_class_uid) is Use.KEPT for each, _, _ in group):
            # what is no image changes nothing that a model sees: the same input must not be run again
            return int(revision)
        write_event(connection, "series.reopened", now, subject, revision=revision + 1)
        return int(revision) + 1

    def _hold(self, connection: Connection, holds: Sequence[tuple[str, AssociationIdentity]], node_id: str) -> None:
        """Let associations hold series open."""
        pairs = dict.fromkeys((association.association_id, series_uid) for series_uid, association in holds)
        names = "association_id", "series_instance_uid"
        if rows := [{**dict(zip(names, pair, strict=True)), "node_id": node_id} for pair in sorted(pairs)]:
            connection.execute(self._hold_series, rows)

    def associations_ended(self, ends: Sequence[AssociationEnd]) -> None:
        """Let go of every series that these associations held, in one transaction."""
        if not ends:
            return
        with self._database.writing() as connection:
            connection.execute(_LET_GO, [end._asdict() for end in ends])
            connection.execute(_HOLDS_NO_MORE, [{"association": end.association} for end in ends])

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
        with self._database.reading() as connection:
            return [OpenSeries(**row) for row in connection.execute(_OPEN_SERIES).mappings()]

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
        with self._database.reading() as connection:
            rows = connection.execute(_INSTANCES, {"uid": series_instance_uid}).all()
        return [StoredInstance(uid, kind, path, digest, _place_in(place)) for uid, kind, path, digest, place in rows]


def _uids(received: Sequence[Received]) -> set[str]:
    return {each.header.sop_instance_uid for each, _, _ in received}


def _require_there(connection: Connection, sop_instance_uids: set[str]) -> None:
    """Lock the series of instances until the transaction ends; raise LedgerUnavailable where one is gone."""
    if not sop_instance_uids:
        return
    query = select(instance.c.sop_instance_uid).join_from(instance, series)
    query = query.where(instance.c.sop_instance_uid.in_(sorted(sop_instance_uids)))
    if len(connection.execute(query.with_for_update(of=series)).all()) != len(sop_instance_uids):
        raise LedgerUnavailable("Deleted while it came again")


_COLUMNS = (
    *("sop_instance_uid", "sop_class_uid", "series_instance_uid", "transfer_syntax_uid", "number_of_frames"),
    *("place", "path", "digest", "size", "received_at"),
)


def _row(received: Instance, at: float) -> tuple[object, ...]:
    """Return the values of `_COLUMNS`."""
    header = received.header
    return (
        *(header.sop_instance_uid, header.sop_class_uid, header.series_instance_uid, received.transfer_syntax_uid),
        *(header.number_of_frames, _place_out(header.place)),
        *(received.path, received.digest, received.size, at),
    )


def _place_out(place: SlicePlace | None) -> str:
    return json.dumps(None if place is None else [place.image_orientation_patient, place.image_position_patient])


def _place_in(value: Any) -> SlicePlace | None:
    return None if value is None else SlicePlace(tuple(value[0]), tuple(value[1]))
