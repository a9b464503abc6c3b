"""What peers take: the node remembers each answer to a proposed presentation context, for a day."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import select

from dicom_node.ledger.database import Database
from dicom_node.ledger.schema import acceptance

Context = tuple[str, str]
"""SOP Class UID and transfer syntax UID."""

_DAY = 86400.0  # seconds; a PACS is upgraded one night, and the next morning it is asked again


class Peers:
    """The memory of what peers accept, by `AETITLE@HOST:PORT`."""

    def __init__(self, database: Database) -> None:
        """Use `database`."""
        self._database = database

    def answered(self, peer: str, answers: Mapping[Context, bool], *, now: float) -> None:
        """Remember for each proposed context whether the peer accepted it."""
        with self._database.writing() as connection:
            for (sop_class_uid, transfer_syntax_uid), accepted in sorted(answers.items()):
                values = {"accepted": accepted, "asked_at": now}
                statement = self._database.insert(acceptance).values(
                    peer=peer, sop_class_uid=sop_class_uid, transfer_syntax_uid=transfer_syntax_uid, **values
                )
                keys = ["peer", "sop_class_uid", "transfer_syntax_uid"]
                connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=values))

    def takes(self, peer: str, *, now: float) -> dict[str, bool]:
        """Return of each SOP Class that the peer was asked about lately whether it takes it in any syntax."""
        query = select(acceptance.c.sop_class_uid, acceptance.c.accepted)
        query = query.where((acceptance.c.peer == peer) & (acceptance.c.asked_at > now - _DAY))
        takes: dict[str, bool] = {}
        with self._database.reading() as connection:
            for sop_class_uid, accepted in connection.execute(query):
                takes[sop_class_uid] = takes.get(sop_class_uid, False) or accepted
        return takes
