"""What works, and is less safe than it could be: advice of `check`."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from dicom_node.broker import address
from dicom_node.config import Settings
from dicom_node.errors import SettingsError

_VERIFIED = ("verify-ca", "verify-full")


def advice(settings: Settings, path: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield what it is about, and what to do, for each thing that would be safer otherwise; `path` is node.toml."""
    yield from _open_files(settings, path)
    yield from _broker(settings)
    yield from _ledger(settings)
    if settings.web.port is not None and not _is_here(settings.web.host):
        yield "web", "web.host: the token goes over the network in the clear; put TLS in front of it"


def _open_files(settings: Settings, path: Path | None) -> Iterator[tuple[str, str]]:
    keys: dict[str, Path | None] = {"tls.key": settings.tls.key}
    if settings.audit.collector and settings.audit.tls_key != settings.tls.key:
        keys["audit.tls_key"] = settings.audit.tls_key
    for name, peer in settings.peer.items():
        if peer.tls and peer.tls_key != settings.tls.key:
            keys[f"peer.{name}.tls_key"] = peer.tls_key
    if path is not None and _holds_secrets(path):
        keys["settings"] = path
    for key, file in keys.items():
        if file is not None and file.is_file() and stat.S_IMODE(file.stat().st_mode) & 0o077:
            mode = stat.S_IMODE(file.stat().st_mode)
            yield key, f"{file} can be read by others (mode {mode:04o}): chmod 600 {file}"


def _holds_secrets(path: Path) -> bool:
    """Return whether a password stands in node.toml itself."""
    text = path.read_text(encoding="utf-8", errors="replace")
    quoted = re.findall(r'^\s*(?:passcode|token|key_password|tls_key_password)\s*=\s*"([^"]+)"', text, re.MULTILINE)
    urls = re.findall(r'^\s*(?:ledger|broker)\s*=\s*"[^":]+://[^":@/]*:([^"@]+)@', text, re.MULTILINE)
    return any(not each.startswith("${") for each in quoted + urls)


def _broker(settings: Settings) -> Iterator[tuple[str, str]]:
    try:
        where = address(settings)
    except SettingsError:
        return  # the check of the broker says so
    if where is None or _is_here(urlsplit(where.url).hostname or ""):
        return
    if where.tls is None:
        yield "broker", "node.broker: another machine, and not encrypted: rediss://"
    elif where.tls["ssl_cert_reqs"] != "required" or not where.tls["ssl_check_hostname"]:
        yield "broker", "node.broker: encrypted, but anybody can pretend to be it: ssl_cert_reqs=required"


def _ledger(settings: Settings) -> Iterator[tuple[str, str]]:
    parts = urlsplit(settings.ledger_url)
    query = parse_qs(parts.query)
    host = parts.hostname or query.get("host", [""])[0]
    if not parts.scheme.startswith("postgresql") or not host or host.startswith("/") or _is_here(host):
        return
    mode = query.get("sslmode", ["prefer"])[0]
    if mode not in _VERIFIED:
        yield "ledger", f"node.ledger: another machine, sslmode={mode}: sslmode=verify-full and sslrootcert="


def _is_here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
