"""Which storage folder a ledger is about: its paths are relative to that one, and to no other."""

from __future__ import annotations

from sqlalchemy import select

from dicom_node.errors import SettingsError
from dicom_node.ledger.database import Database
from dicom_node.ledger.schema import home

_ONE = 1  # there is one row


class Home:
    """The one fact about the ledger itself."""

    def __init__(self, database: Database) -> None:
        """Use `database`."""
        self._database = database

    def bind(self, storage_id: str) -> None:
        """Let the ledger be about a storage folder, named by what is in its `storage.id`.

        Raises SettingsError where it is about another: two nodes with folders of their own cannot share a ledger, for
        each would be asked for files that only the other has.
        """
        with self._database.writing() as connection:
            row = self._database.insert(home).values(one=_ONE, storage_id=storage_id).on_conflict_do_nothing()
            connection.execute(row)
            bound = connection.execute(select(home.c.storage_id)).scalar_one()
        if bound != storage_id:
            raise SettingsError(
                "node.ledger: it is about another storage folder, and every node needs a ledger of its own "
                f"(where this folder took that one's place, write {bound} into its storage.id)"
            )
