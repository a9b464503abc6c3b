"""node.toml, read once into one frozen Settings; every mistake names its key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)
from pydicom.datadict import tag_for_keyword

from dicom_node.catalogue import ModelFolder, default_folder, read_catalogue, suggestion
from dicom_node.errors import SettingsError
from dicom_node.expansion import expand
from dicom_node.forms import DEFAULT_RESULTS, Wish
from dicom_node.lifecycle import Patience
from dicom_node.routing import CALLING_AE_TITLE, Route
from dicom_node.services import RESULT_KIND_NAMES, Admission, Credentials

Port = Annotated[int, Field(ge=0, le=65535)]
OneOrMore = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value), Field(min_length=1)
]
Seconds = Annotated[float, Field(ge=0)]

_AE_TITLE = r"^[ -\[\]-~]{1,16}$"  # PS3.5: no backslash
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$"
_DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"
_PATTERNS = {
    _AE_TITLE: "an AE title: 1 to 16 characters, no backslash",
    _NAME: "a name: 1 to 32 letters, digits, - and _",
    _DEVICE: 'a device: "auto", "cpu", "cuda" or "cuda:N"',
}
AeTitle = Annotated[str, StringConstraints(pattern=_AE_TITLE, strip_whitespace=True)]
Name = Annotated[str, StringConstraints(pattern=_NAME)]
CANDIDATES = (Path("node.toml"), Path("/etc/dicom-node/node.toml"))


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NodeTable(_Table):
    """[node]: who the node is and where it keeps things."""

    ae_title: AeTitle = "DICOM_NODE"
    host: str = "0.0.0.0"  # noqa: S104 - a DICOM listener that only its own machine reaches receives nothing
    port: Port = 11112
    storage: Path = Path("dicom-node-data")
    models: Path = Field(default_factory=default_folder)
    ledger: str = Field(default="", repr=False)  # SQLAlchemy URL; empty: SQLite in `storage`
    broker: str = Field(default="", repr=False)  # redis://...; empty: the node starts its own and one set of workers
    device: Annotated[str, StringConstraints(pattern=_DEVICE)] = "auto"
    model_memory_megabytes: Annotated[int, Field(ge=0)] = 0  # of all contained models together


class TlsTable(_Table):
    """[tls]: certificates; with them the node listens on a second port, by the BCP 195 profile (PS3.15 B.12)."""

    port: Port = 2762
    certificate: Path | None = None  # PEM, with the chain
    key: Path | None = None
    key_password: str = Field(default="", repr=False)
    ca: Path | None = None  # who signs the certificates of peers
    client_certificates: Literal["required", "none"] = "required"
    minimum_version: Literal["1.2", "1.3"] = "1.2"

    @property
    def is_on(self) -> bool:
        """Return whether the node listens with TLS."""
        return self.certificate is not None


class ReceiveTable(_Table):
    """[receive]: what the SCP lets in."""

    plain: bool = True  # listen without TLS, on node.port
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


class CompletionTable(_Table):
    """[completion]: how long to wait for more of a series, in seconds."""

    settle: Seconds = 2.0
    quiet: Seconds = 20.0


class JobsTable(_Table):
    """[jobs]: leases and limits."""

    lease: Annotated[float, Field(ge=5)] = 60.0
    maximum_attempts: Annotated[int, Field(ge=1)] = 3
    sweep: Annotated[float, Field(gt=0)] = 0.5
    hint_again: Annotated[float, Field(gt=0)] = 10.0


class DeliveryTable(_Table):
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


class CommitmentTable(_Table):
    """[commitment]: storage commitment; whom the node asks is `commitment` of a peer."""

    answer: bool = True  # as SCP: promise to keep what is held, to whoever asks
    same_association_after: Seconds = 1.0  # an association still open then waits for its report
    report_wait: Seconds = 2.0  # how long a delivery keeps its own association open for the report
    ask_again_after: Annotated[float, Field(gt=0)] = 3600.0


class LabellingTable(_Table):
    """[labelling]: what every result says about itself."""

    qualification: Literal["RESEARCH", "PRODUCT", "SERVICE"] = "RESEARCH"
    disclaimer: Annotated[str, StringConstraints(max_length=200)] = (
        "Not for diagnosis. AI result, not verified by a physician."
    )
    series_number: Annotated[int, Field(ge=1, le=2**30)] = 9000


class Peer(_Table):
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
    tls_key_password: str = Field(default="", repr=False)
    tls_minimum_version: Literal["1.2", "1.3"] | None = None
    certificate_sha256: tuple[str, ...] = ()  # who calls with this AE title must show one of these certificates
    user: str = ""  # who calls with this AE title must name this user (PS3.7 D.3.3.7)
    passcode: str = Field(default="", repr=False)
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


class RouteTable(_Table):
    """[[route]]: a sentence of the operator."""

    name: str = ""
    when: Mapping[str, str] = Field(default_factory=dict)
    run: OneOrMore
    send_to: OneOrMore

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


class Settings(_Table):
    """Everything an operator can set."""

    node: NodeTable = NodeTable()
    tls: TlsTable = TlsTable()
    receive: ReceiveTable = ReceiveTable()
    completion: CompletionTable = CompletionTable()
    jobs: JobsTable = JobsTable()
    delivery: DeliveryTable = DeliveryTable()
    commitment: CommitmentTable = CommitmentTable()
    labelling: LabellingTable = LabellingTable()
    peer: Mapping[Name, Peer] = Field(default_factory=dict)
    route: tuple[RouteTable, ...] = ()

    @property
    def routes(self) -> tuple[Route, ...]:
        """Return the routes as values that `routing` matches."""
        return tuple(
            Route(table.name or f"route {number}", dict(table.when), table.run, table.send_to)
            for number, table in enumerate(self.route, start=1)
        )

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


def load(path: Path | None = None) -> Settings:
    """Read the settings from `path`, or from the first of CANDIDATES that exists, or take the defaults.

    Relative folders are relative to the file. Raises SettingsError that names the key and what to write.
    """
    path = path or next((candidate for candidate in CANDIDATES if candidate.is_file()), None)
    if path is None:
        return Settings()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 at byte {error.start}") from error
    return parse(text, where=str(path), base=path.parent)


def parse(text: str, *, where: str = "node.toml", base: Path = Path()) -> Settings:
    """Read settings from TOML `text`; `base` is what relative folders are relative to."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{where}: not TOML: {error}") from error
    data = expand(data, where=where, base=base)
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        raise SettingsError("\n".join(f"{where}: {line}" for line in _explained(error))) from error
    settings = _with_absolute_folders(settings, base)
    problems = list(_broken_references(settings))
    if problems:
        raise SettingsError("\n".join(f"{where}: {line}" for line in problems))
    return settings


def _with_absolute_folders(settings: Settings, base: Path) -> Settings:
    node = settings.node
    folders = {"storage": (base / node.storage).absolute(), "models": (base / node.models).absolute()}
    files = {name: _beside(base, getattr(settings.tls, name)) for name in ("certificate", "key", "ca")}
    tls = settings.tls.model_copy(update=files)
    peers = {name: _with_tls(peer, tls, base) for name, peer in settings.peer.items()}
    return settings.model_copy(update={"node": node.model_copy(update=folders), "tls": tls, "peer": peers})


def _beside(base: Path, path: Path | None) -> Path | None:
    return (base / path).absolute() if path else None


def _with_tls(peer: Peer, tls: TlsTable, base: Path) -> Peer:
    """Give a peer what [tls] says wherever its own table says nothing; a certificate and its key go together."""
    own = peer.tls_certificate is not None
    values = {
        "tls_ca": _beside(base, peer.tls_ca) or tls.ca,
        "tls_certificate": _beside(base, peer.tls_certificate) or tls.certificate,
        "tls_key": _beside(base, peer.tls_key) if own else tls.key,
        "tls_key_password": peer.tls_key_password if own else tls.key_password,
        "tls_minimum_version": peer.tls_minimum_version or tls.minimum_version,
    }
    return peer.model_copy(update=values)


def _broken_references(settings: Settings) -> Iterator[str]:
    """Yield a line for every name in a route that nothing bears."""
    models, peers = settings.catalogue(), settings.peer
    for number, route in enumerate(settings.routes):
        for model in route.run:
            if model not in models:
                yield f'route[{number}].run: no model "{model}" in {settings.node.models}{suggestion(model, models)}'
        for peer in route.send_to:
            if peer not in peers:
                yield f"route[{number}].send_to: no [peer.{peer}]{suggestion(peer, dict(peers))}"


def _explained(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        *parents, last = problem["loc"]
        key = _key(problem["loc"])
        if problem["type"] == "extra_forbidden":
            yield f"{key}: no such key{suggestion(str(last), _keys_of(parents))}"
        elif problem["type"] == "literal_error":
            words = re.findall(r"'([^']*)'", str(problem.get("ctx", {}).get("expected", "")))
            yield f"{key}: {problem['input']!r} is not one of the words{suggestion(str(problem['input']), words)}"
        elif problem["type"] == "string_pattern_mismatch":
            yield f"{key}: {problem['input']!r} is not {_PATTERNS.get(problem['ctx']['pattern'], 'of the right form')}"
        elif problem["type"] == "model_type":
            yield f"{key}: must be a table, written [{key}]"
        else:
            yield f"{key}: {problem['msg'].removeprefix('Value error, ')}"


def _key(location: tuple[int | str, ...]) -> str:
    parts = [part for part in location if part != "[key]"]  # pydantic's word for the name of a table
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def _keys_of(parents: list[int | str]) -> list[str]:
    """Return the keys that the table at `parents` may have."""
    tables: dict[str, type[BaseModel]] = {"peer": Peer, "route": RouteTable}
    if not parents:
        return list(Settings.model_fields)
    table: Any = tables.get(str(parents[0])) or Settings.model_fields[str(parents[0])].annotation
    return list(table.model_fields)


def _nearest_keyword(word: str) -> str:
    from pydicom._dicom_dict import DicomDictionary

    return suggestion(word, [entry[4] for entry in DicomDictionary.values()])
