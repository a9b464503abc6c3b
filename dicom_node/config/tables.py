"""The tables of node.toml: every key with its default, its unit and what it may hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, field_validator
from pydicom.datadict import tag_for_keyword

from dicom_node.catalogue import default_folder, suggestion
from dicom_node.forms import DEFAULT_RESULTS, Wish
from dicom_node.lifecycle import Courtesy, Patience
from dicom_node.retention import Policy
from dicom_node.routing import CALLING_AE_TITLE
from dicom_node.services import RESULT_KIND_NAMES

Port = Annotated[int, Field(ge=0, le=65535)]
OneOrMore = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value), Field(min_length=1)
]
Seconds = Annotated[float, Field(ge=0)]

Secret = Annotated[str, Field(repr=False, exclude=True)]  # in no dump and no representation of a table

_AE_TITLE = r"^[ -\[\]-~]{1,16}$"  # PS3.5: no backslash
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$"
_COLLECTOR = r"^(\S+:\d{1,5})?$"
_DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"
PATTERNS = {
    _AE_TITLE: "an AE title: 1 to 16 characters, no backslash",
    _NAME: "a name: 1 to 32 letters, digits, - and _",
    _COLLECTOR: 'an address: "host:port"',
    _DEVICE: 'a device: "auto", "cpu", "cuda" or "cuda:N"',
}
AeTitle = Annotated[str, StringConstraints(pattern=_AE_TITLE, strip_whitespace=True)]
Name = Annotated[str, StringConstraints(pattern=_NAME)]


class Table(BaseModel):
    """What every table is: read once, frozen, without keys that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NodeTable(Table):
    """[node]: who the node is and where it keeps things."""

    ae_title: AeTitle = "DICOM_NODE"
    host: str = "0.0.0.0"  # noqa: S104 - a DICOM listener that only its own machine reaches receives nothing
    port: Port = 11112
    storage: Path = Path("dicom-node-data")
    models: Path = Field(default_factory=default_folder)
    ledger: Secret = ""  # SQLAlchemy URL; empty: SQLite in `storage`
    broker: Secret = ""  # redis://...; empty: the node starts its own and one set of workers
    device: Annotated[str, StringConstraints(pattern=_DEVICE)] = "auto"
    workers: Annotated[int, Field(ge=0)] = 0  # that run models; 0: one for each GPU, else one
    model_memory_megabytes: Annotated[int, Field(ge=0)] = 0  # of all contained models together


class TlsTable(Table):
    """[tls]: certificates; with them the node listens on a second port, by the BCP 195 profile (PS3.15 B.12)."""

    port: Port = 2762
    certificate: Path | None = None  # PEM, with the chain
    key: Path | None = None
    key_password: Secret = ""
    ca: Path | None = None  # who signs the certificates of peers
    client_certificates: Literal["required", "none"] = "required"
    minimum_version: Literal["1.2", "1.3"] = "1.2"

    @property
    def is_on(self) -> bool:
        """Return whether the node listens with TLS."""
        return self.certificate is not None


class WebTable(Table):
    """[web]: health, readiness and metrics over HTTP, read-only."""

    host: str = "127.0.0.1"
    port: Port | None = None  # None: nothing listens
    token: Secret = ""  # empty: the node makes one, web.token in the storage folder


class ReceiveTable(Table):
    """[receive]: what the SCP lets in."""

    plain: bool = True  # listen without TLS, on node.port
    processes: Annotated[int, Field(ge=1, le=64)] = 1  # that receive, on the same ports
    addresses: tuple[str, ...] = ()  # networks that may connect, such as 10.1.0.0/16; empty: all

    @field_validator("addresses")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            ip_network(network)  # its message names what is wrong with it
        return value

    check_called_ae_title: bool = False
    calling_ae_titles: tuple[AeTitle, ...] = ()
    maximum_associations: Annotated[int, Field(ge=1)] = 200
    maximum_associations_per_peer: Annotated[int, Field(ge=1)] = 100
    maximum_pdu_length: Annotated[int, Field(ge=4096, le=2**27)] = 131072
    keep_private_sop_classes: bool = False
    maximum_connections_per_address: Annotated[int, Field(ge=1)] = 150
    maximum_instance_megabytes: Annotated[int, Field(ge=1)] = 4096
    association_timeout: Annotated[float, Field(gt=0)] = 30.0  # from the connection to the whole A-ASSOCIATE-RQ
    network_timeout: Annotated[float, Field(gt=0)] = 60.0  # for one PDU, or without any
    minimum_free_megabytes: Annotated[int, Field(ge=0)] = 1024


class CompletionTable(Table):
    """[completion]: how long to wait for more of a series, in seconds."""

    settle: Seconds = 2.0
    quiet: Seconds = 20.0


class JobsTable(Table):
    """[jobs]: leases and limits."""

    lease: Annotated[float, Field(ge=5)] = 60.0
    maximum_attempts: Annotated[int, Field(ge=1)] = 3  # that ended in a defect; what is unavailable is waited for
    maximum_deaths: Annotated[int, Field(ge=1)] = 10  # of workers, at one inference
    sweep: Annotated[float, Field(gt=0)] = 0.5
    hint_again: Annotated[float, Field(gt=0)] = 10.0
    give_way_for: Seconds = 3600.0  # since it is wanted; then a job is not interrupted any more
    give_way_times: Annotated[int, Field(ge=0)] = 3  # interruptions of one job by more urgent ones

    @property
    def courtesy(self) -> Courtesy:
        """Return how long a job gives way to more urgent ones."""
        return Courtesy(self.give_way_for, self.give_way_times)


class DeliveryTable(Table):
    """[delivery]: how to knock at a peer that is away."""

    connect_timeout: Annotated[float, Field(gt=0)] = 10.0
    response_timeout: Annotated[float, Field(gt=0)] = 60.0
    first_delay: Annotated[float, Field(gt=0)] = 5.0
    maximum_delay: Annotated[float, Field(gt=0)] = 600.0
    give_up_after_days: Annotated[float, Field(gt=0)] = 14.0

    @property
    def patience(self) -> Patience:
        """Return how a peer that is away is tried again."""
        return Patience(self.first_delay, self.maximum_delay, self.give_up_after_days)


class CommitmentTable(Table):
    """[commitment]: storage commitment; whom the node asks is `commitment` of a peer."""

    answer: bool = True  # as SCP: promise to keep what is held, to whoever asks
    same_association_after: Seconds = 1.0  # an association still open then waits for its report
    report_wait: Seconds = 2.0  # how long a delivery keeps its own association open for the report
    ask_again_after: Annotated[float, Field(gt=0)] = 3600.0


Days = Annotated[float, Field(ge=0)]


class RetentionTable(Table):
    """[retention]: what is deleted, and when; 0 never does. Whatever somebody still waits for stays in any case."""

    days: Days = 0.0  # after the end of all work on a study
    free_megabytes: Annotated[int, Field(ge=0)] = 0  # below it the oldest finished studies go
    only_committed: bool = False  # and only those whose results every peer has committed
    promise_days: Days = 0.0  # how long the node's own storage commitment holds
    quarantine_days: Days = 0.0
    history_days: Days = 0.0  # of events of studies that are gone, and of no study

    @property
    def policy(self) -> Policy:
        """Return what decides about a study."""
        return Policy(self.days, self.promise_days, self.only_committed)


class AuditTable(Table):
    """[audit]: the audit trail (PS3.15 A.5), in the ledger always, at a collector where there is one."""

    collector: Annotated[str, StringConstraints(pattern=_COLLECTOR)] = ""  # syslog over TLS (RFC 5425)
    site: str = ""  # Audit Enterprise Site ID
    source: str = ""  # Audit Source ID; the node's AE title by default
    patient: bool = False  # messages to the collector say who the patient is, as the standard has it
    spool_megabytes: Annotated[int, Field(ge=1)] = 256  # messages that wait while the collector is away
    tls_name: str = ""  # whose certificate the collector must show; its host by default
    tls_ca: Path | None = None  # these five instead of those of [tls]
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_key_password: Secret = ""
    tls_minimum_version: Literal["1.2", "1.3"] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Return the collector's host and port."""
        host, _, port = self.collector.rpartition(":")
        return host.strip("[]"), int(port)


class LabellingTable(Table):
    """[labelling]: what every result says about itself."""

    qualification: Literal["RESEARCH", "PRODUCT", "SERVICE"] = "RESEARCH"
    disclaimer: Annotated[str, StringConstraints(max_length=200)] = (
        "Not for diagnosis. AI result, not verified by a physician."
    )
    series_number: Annotated[int, Field(ge=1, le=2**30)] = 9000


class Peer(Table):
    """[peer.NAME]: an application entity that gets results."""

    ae_title: AeTitle
    host: str
    port: Annotated[int, Field(ge=1, le=65535)]
    results: Annotated[tuple[str, ...], Field(min_length=1)] = DEFAULT_RESULTS
    segmentation_type: Literal["BINARY", "LABELMAP"] = "BINARY"
    split_segmentations_above: Annotated[int, Field(ge=0)] = 0  # frames; 0: never
    calling_ae_title: AeTitle | None = None  # how the node names itself there; its own by default
    tls: bool = False
    tls_name: str = ""  # whose certificate it must show; its host by default
    tls_ca: Path | None = None  # these five instead of those of [tls]
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_key_password: Secret = ""
    tls_minimum_version: Literal["1.2", "1.3"] | None = None
    certificate_sha256: tuple[str, ...] = ()  # who calls with this AE title must show one of these certificates
    user: str = ""  # who calls with this AE title must name this user (PS3.7 D.3.3.7)
    passcode: Secret = ""
    commitment: bool = False  # delivered means committed (PS3.4 Annex J)

    @field_validator("results")
    @classmethod
    def _kinds(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for kind in value:
            if kind not in RESULT_KIND_NAMES:
                nearest = suggestion(kind, list(RESULT_KIND_NAMES))
                raise ValueError(f"no result kind {kind!r} (there is {', '.join(RESULT_KIND_NAMES)}){nearest}")
        return tuple(dict.fromkeys(value))

    @field_validator("certificate_sha256")
    @classmethod
    def _fingerprints(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        plain = tuple(each.replace(":", "").lower() for each in value)
        for each in plain:
            if not re.fullmatch(r"[0-9a-f]{64}", each):
                raise ValueError("a SHA-256 fingerprint has 64 hexadecimal digits: openssl x509 -fingerprint -sha256")
        return plain

    @property
    def wish(self) -> Wish:
        """Return which results the peer should get, and in which form."""
        return Wish(self.results, self.segmentation_type, self.split_segmentations_above)

    @property
    def address(self) -> str:
        """Return what names the peer in the ledger's memory of what it takes: another host is another peer."""
        return f"{self.ae_title}@{self.host}:{self.port}"


class RouteTable(Table):
    """[[route]]: a sentence of the operator."""

    name: str = ""
    when: Mapping[str, str] = Field(default_factory=dict)
    run: OneOrMore
    send_to: OneOrMore
    priority: Literal["urgent", "normal", "background"] = "normal"

    @field_validator("when")
    @classmethod
    def _keys_and_patterns(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        for key, pattern in value.items():
            if key != CALLING_AE_TITLE and tag_for_keyword(key) is None:
                raise ValueError(f"{key!r} is no DICOM keyword{_nearest_keyword(key)}")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{key}: {pattern!r} is no regular expression: {error}") from error
        return value


def _nearest_keyword(word: str) -> str:
    from pydicom._dicom_dict import DicomDictionary

    return suggestion(word, [entry[4] for entry in DicomDictionary.values()])
