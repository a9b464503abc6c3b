"""Everything that an operator can set, as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_network

from pydantic import Field

from dicom_node.catalogue import ModelFolder, read_catalogue
from dicom_node.config.tables import (
    AuditTable,
    CommitmentTable,
    CompletionTable,
    DeliveryTable,
    JobsTable,
    LabellingTable,
    Name,
    NodeTable,
    Peer,
    ReceiveTable,
    RetentionTable,
    RouteTable,
    Table,
    TlsTable,
    WebTable,
)
from dicom_node.routing import Priority, Route
from dicom_node.services import Admission, Credentials


class Settings(Table):
    """Everything an operator can set."""

    node: NodeTable = NodeTable()
    tls: TlsTable = TlsTable()
    web: WebTable = WebTable()
    receive: ReceiveTable = ReceiveTable()
    completion: CompletionTable = CompletionTable()
    jobs: JobsTable = JobsTable()
    delivery: DeliveryTable = DeliveryTable()
    commitment: CommitmentTable = CommitmentTable()
    retention: RetentionTable = RetentionTable()
    audit: AuditTable = AuditTable()
    labelling: LabellingTable = LabellingTable()
    peer: Mapping[Name, Peer] = Field(default_factory=dict)
    route: tuple[RouteTable, ...] = ()

    @property
    def routes(self) -> tuple[Route, ...]:
        """Return the routes as values that `routing` matches."""
        return tuple(
            Route(
                table.name or f"route {number}",
                dict(table.when),
                table.run,
                table.send_to,
                Priority[table.priority.upper()],
            )
            for number, table in enumerate(self.route, start=1)
        )

    @property
    def routed_models(self) -> tuple[str, ...]:
        """Return the models that routes run, in the order of the routes."""
        return tuple(dict.fromkeys(model for table in self.route for model in table.run))

    @property
    def ledger_url(self) -> str:
        """Return where the ledger is: the URL that is set, else SQLite in the storage folder."""
        return self.node.ledger or f"sqlite:///{self.node.storage.absolute() / 'ledger.sqlite3'}"

    def peer_by_title(self, ae_title: str) -> Peer | None:
        """Return the first peer that bears an AE title: where what an application entity asked for is sent."""
        return next((peer for peer in self.peer.values() if peer.ae_title == ae_title), None)

    @property
    def admission(self) -> Admission:
        """Return who may associate."""
        return Admission(
            ae_title=self.node.ae_title,
            check_called_ae_title=self.receive.check_called_ae_title,
            calling_ae_titles=frozenset(self.receive.calling_ae_titles),
            maximum_associations=self.receive.maximum_associations,
            maximum_associations_per_peer=self.receive.maximum_associations_per_peer,
            networks=tuple(ip_network(network) for network in self.receive.addresses),
            credentials={
                peer.ae_title: Credentials(frozenset(peer.certificate_sha256), peer.user, peer.passcode)
                for peer in self.peer.values()
                if peer.certificate_sha256 or peer.user
            },
        )

    def catalogue(self) -> Mapping[str, ModelFolder]:
        """Return the models that exist; raise SettingsError where a manifest is wrong."""
        return read_catalogue(self.node.models)
