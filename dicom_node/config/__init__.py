"""node.toml, read once into one frozen Settings; every mistake names its key."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from dicom_node.catalogue import suggestion
from dicom_node.config.explaining import explained
from dicom_node.config.settings import Settings
from dicom_node.config.tables import AuditTable, CompletionTable, DeliveryTable, Peer, TlsTable
from dicom_node.errors import SettingsError
from dicom_node.expansion import expand, withheld

__all__ = [
    "CANDIDATES",
    "AuditTable",
    "CompletionTable",
    "DeliveryTable",
    "Peer",
    "Settings",
    "TlsTable",
    "load",
    "parse",
]

Partner = TypeVar("Partner", Peer, AuditTable)

CANDIDATES = (Path("node.toml"), Path("/etc/dicom-node/node.toml"))


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
    secrets: set[str] = set()
    data = expand(data, where=where, base=base, found=secrets)
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        lines = [withheld(line, secrets) for line in explained(error)]
        raise SettingsError("\n".join(f"{where}: {line}" for line in lines)) from None  # the cause quotes its input
    settings = _with_absolute_folders(settings, base)
    problems = [*_broken_references(settings), *_contradictions(settings)]
    if problems:
        raise SettingsError("\n".join(f"{where}: {withheld(line, secrets)}" for line in problems))
    return settings


def _with_absolute_folders(settings: Settings, base: Path) -> Settings:
    node = settings.node
    folders = {"storage": (base / node.storage).absolute(), "models": (base / node.models).absolute()}
    files = {name: _beside(base, getattr(settings.tls, name)) for name in ("certificate", "key", "ca")}
    tls = settings.tls.model_copy(update=files)
    peers = {name: _with_tls(peer, tls, base) for name, peer in settings.peer.items()}
    audit = _with_tls(settings.audit, tls, base)
    update = {"node": node.model_copy(update=folders), "tls": tls, "audit": audit, "peer": peers}
    return settings.model_copy(update=update)


def _beside(base: Path, path: Path | None) -> Path | None:
    return (base / path).absolute() if path else None


def _with_tls(peer: Partner, tls: TlsTable, base: Path) -> Partner:
    """Give a peer, or the collector, what [tls] says where its own table says nothing; certificate and key together."""
    own = peer.tls_certificate is not None
    values = {
        "tls_ca": _beside(base, peer.tls_ca) or tls.ca,
        "tls_certificate": _beside(base, peer.tls_certificate) or tls.certificate,
        "tls_key": _beside(base, peer.tls_key) if own else tls.key,
        "tls_key_password": peer.tls_key_password if own else tls.key_password,
        "tls_minimum_version": peer.tls_minimum_version or tls.minimum_version,
    }
    return peer.model_copy(update=values)


def _contradictions(settings: Settings) -> Iterator[str]:
    """Yield a line for what cannot work together."""
    wanted, watermark = settings.retention.free_megabytes, settings.receive.minimum_free_megabytes
    if 0 < wanted < watermark * 1.2:
        yield (
            f"retention.free_megabytes: {wanted} is too little: the door for C-STORE opens above "
            f"receive.minimum_free_megabytes = {watermark} and a tenth; write at least {watermark * 1.2:.0f}"
        )


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
