"""TLS for DIMSE by the BCP 195 profile (PS3.15 B.12, RFC 9325): version 1.2 or later, ephemeral keys, AEAD ciphers."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Callable
from pathlib import Path

import structlog

from dicom_node.config import AuditTable, Peer, TlsTable
from dicom_node.errors import SettingsError

log = structlog.get_logger()

CIPHER_SUITES = (  # of TLS 1.2, the preferred first; those of 1.3 are all of this kind
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-CHACHA20-POLY1305",
)
_MISMATCHES = frozenset({"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"})
_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


def server_context(table: TlsTable) -> ssl.SSLContext:
    """Return what accepts connections; raise SettingsError that names the key and the file where it cannot be made."""
    if table.certificate is None or table.key is None:
        raise SettingsError("tls.certificate and tls.key: both are needed to listen with TLS")
    context = _context(ssl.PROTOCOL_TLS_SERVER, table.minimum_version)
    _load_chain(context, table.certificate, table.key, table.key_password)
    if table.client_certificates == "required":
        if table.ca is None:
            raise SettingsError('tls.ca: needed to verify clients; client_certificates = "none" lets in anybody')
        _load_ca(context, table.ca, "tls.ca")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(peer: Peer | AuditTable) -> ssl.SSLContext:
    """Return what connects to a peer or the audit collector: verified, and shown our certificate if there is one."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, peer.tls_minimum_version or "1.2")
    if peer.tls_ca is None:
        who = f"the peer {peer.ae_title}: tls = true" if isinstance(peer, Peer) else "audit.collector"
        raise SettingsError(f"{who} needs tls_ca, or tls.ca, to verify it with")
    _load_ca(context, peer.tls_ca, "tls_ca")
    if peer.tls_certificate is not None and peer.tls_key is not None:
        _load_chain(context, peer.tls_certificate, peer.tls_key, peer.tls_key_password)
    return context


def fingerprint(certificate: bytes | None) -> str | None:
    """Return the SHA-256 (hex) of a certificate in DER, as `openssl x509 -fingerprint -sha256` shows it."""
    return hashlib.sha256(certificate).hexdigest() if certificate else None


class Reloading:
    """A context that follows its files: new connections get the new one; a broken file leaves the old one in force."""

    def __init__(self, table: TlsTable, make: Callable[[TlsTable], ssl.SSLContext] = server_context) -> None:
        """Make the first; raise SettingsError where that fails."""
        self._table = table
        self._make = make
        self._seen = self._stamps()
        self.context = make(table)

    def reload(self) -> bool:
        """Look at the files; return whether there is a new context."""
        stamps = self._stamps()
        if stamps == self._seen:
            return False
        self._seen = stamps
        try:
            self.context = self._make(self._table)
        except SettingsError as error:
            log.error("tls.not_reloaded", reason=str(error))
            return False
        log.info("tls.reloaded")
        return True

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in (self._table.certificate, self._table.key, self._table.ca) if path]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _context(protocol: int, minimum_version: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = _VERSIONS[minimum_version]
    context.set_ciphers(":".join(CIPHER_SUITES))
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    return context


def _load_chain(context: ssl.SSLContext, certificate: Path, key: Path, password: str) -> None:
    for path, name in ((certificate, "tls.certificate"), (key, "tls.key")):
        _require_readable(path, name)
    try:
        # a function, so that a key without its password is an error and never a question on the terminal
        context.load_cert_chain(certificate, key, password=lambda: password)
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or "not PEM, or the password is wrong"
        if reason in _MISMATCHES:
            reason = "the key is another certificate's"
        raise SettingsError(f"tls.certificate {certificate}, tls.key {key}: {reason}") from error


def _load_ca(context: ssl.SSLContext, path: Path, name: str) -> None:
    _require_readable(path, name)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise SettingsError(f"{name} {path}: no certificate in PEM") from error


def _require_readable(path: Path, name: str) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise SettingsError(f"{name} {path}: {error.strerror}") from error
