"""Which files there have to be, and what has to be in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Table, func, select

from dicom_node.ledger.database import Database
from dicom_node.ledger.schema import instance, job, result, series

_PAGE = 1000  # rows that are read together
_AT_ONCE = 500  # UIDs in one question to the database


@dataclass(frozen=True, slots=True)
class Item:
    """A file that the ledger vouches for; `digest` is of the whole file for a result, of the data set otherwise."""

    sop_instance_uid: str
    transfer_syntax_uid: str
    study_instance_uid: str
    path: str
    digest: str
    is_result: bool


class Inventory:
    """Reads what is held, page by page: no transaction is open in between."""

    def __init__(self, database: Database) -> None:
        """Use `database`."""
        self._database = database

    def count(self, study_instance_uid: str | None = None) -> int:
        """Return how many files there are, of one study or of all."""
        total = 0
        with self._database.reading() as connection:
            for table in (instance, result):
                query = select(func.count()).select_from(_joined(table))
                if study_instance_uid is not None:
                    query = query.where(series.c.study_instance_uid == study_instance_uid)
                total += int(connection.execute(query).scalar_one())
        return total

    def items(self, study_instance_uid: str | None = None) -> Iterator[Item]:
        """Yield every file of one study or of all, in the order of the UIDs: received ones, then results."""
        for table in (instance, result):
            after = ""
            while page := self._page(table, after, study_instance_uid):
                yield from page
                after = page[-1].sop_instance_uid

    def named(self, uids: Iterable[str]) -> dict[str, Item]:
        """Return by path whatever is held now under these SOP Instance UIDs."""
        wanted = sorted(set(uids))
        found: dict[str, Item] = {}
        with self._database.reading() as connection:
            for table in (instance, result):
                for start in range(0, len(wanted), _AT_ONCE):
                    query = _select(table).where(table.c.sop_instance_uid.in_(wanted[start : start + _AT_ONCE]))
                    items = (_item(row, table) for row in connection.execute(query))
                    found |= {item.path: item for item in items}
        return found

    def _page(self, table: Table, after: str, study_instance_uid: str | None) -> list[Item]:
        query = _select(table).where(table.c.sop_instance_uid > after)
        if study_instance_uid is not None:
            query = query.where(series.c.study_instance_uid == study_instance_uid)
        query = query.order_by(table.c.sop_instance_uid).limit(_PAGE)
        with self._database.reading() as connection:
            return [_item(row, table) for row in connection.execute(query)]


def _joined(table: Table) -> Any:
    return instance.join(series) if table is instance else result.join(job).join(series)


def _select(table: Table) -> Any:
    columns = (
        table.c.sop_instance_uid,
        table.c.transfer_syntax_uid,
        series.c.study_instance_uid,
        table.c.path,
        table.c.digest if table is instance else table.c.sha256,
    )
    return select(*columns).select_from(_joined(table))


def _item(row: Any, table: Table) -> Item:
    uid, transfer_syntax_uid, study_instance_uid, path, digest = row
    return Item(uid, transfer_syntax_uid, study_instance_uid, path, digest, table is result)
