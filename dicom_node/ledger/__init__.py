"""The ledger: the only SQL there is, and the truth about every instance, series, job and result."""

from __future__ import annotations

from dicom_node.ledger.arrivals import Arrivals
from dicom_node.ledger.commitments import Commitments
from dicom_node.ledger.database import open_database
from dicom_node.ledger.departures import Departures
from dicom_node.ledger.figures import Figures
from dicom_node.ledger.history import History
from dicom_node.ledger.home import Home
from dicom_node.ledger.inventory import Inventory
from dicom_node.ledger.jobs import Jobs
from dicom_node.ledger.moments import Moments
from dicom_node.ledger.peers import Peers
from dicom_node.ledger.queue import Queue


class Ledger:
    """One ledger, by subject."""

    def __init__(self, url: str, *, migrate: bool = False) -> None:
        """Open the database at `url`; with `migrate`, bring its schema up to date first."""
        self._database = open_database(url, migrate=migrate)
        self.arrivals = Arrivals(self._database)
        self.jobs = Jobs(self._database)
        self.queue = Queue(self._database)
        self.commitments = Commitments(self._database)
        self.departures = Departures(self._database)
        self.home = Home(self._database)
        self.inventory = Inventory(self._database)
        self.figures = Figures(self._database)
        self.history = History(self._database)
        self.moments = Moments(self._database)
        self.peers = Peers(self._database)

    def require_schema(self) -> None:
        """Raise LedgerUnavailable or SettingsError where the ledger is of an earlier or a later version than this."""
        self._database.require_schema()

    def close(self) -> None:
        """Close every connection."""
        self._database.close()
