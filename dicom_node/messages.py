"""Celery's messages between node and workers, sealed: what does not bear the node's seal is taken off and forgotten.

The seal is looked at where the bytes come in, before anything is parsed: a message that the node did not write has no
task, no argument, no callback and no moment that Celery could act on.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import redis
import structlog
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport.redis import Channel as RedisChannel
from kombu.transport.redis import Transport as RedisTransport
from kombu.utils.json import dumps

from dicom_node.broker import address, socket_path
from dicom_node.config import Settings
from dicom_node.seal import opened, sealed
from dicom_node.secret import own_secret

log = structlog.get_logger()

_KEY_FILE = "broker.key"
_SCHEME = "sealed"
_SHORTEST = 64  # bytes below which there is no seal at all


def celery_settings(settings: Settings) -> dict[str, Any]:
    """Return what Celery needs to reach the broker, with sealed messages; the same for node and worker.

    Raises SettingsError where the broker's URL is wrong, or the key can be neither read nor made.
    """
    where = address(settings)
    path = str(socket_path(settings)).replace("%", "%25").replace("?", "%3F").replace("#", "%23")
    return {
        "broker_url": f"{_SCHEME}://{where.rest}" if where else f"{_SCHEME}+socket://{path}",
        "broker_use_ssl": where.tls if where else None,
        "broker_transport_options": {
            "seal_key": own_secret(settings.node.storage, _KEY_FILE),
            "priority_steps": [0],
            "ack_emulation": False,  # a message that dies with its worker is sent again by the ledger
            "socket_connect_timeout": 3,
            "socket_keepalive": True,
        },
    }


class _Reader(redis.Redis):
    """A client whose blocking reads give only what bears the seal."""

    def __init__(self, *, key: bytes, ignored: set[str], **options: Any) -> None:
        super().__init__(**options)
        self._key, self._ignored = key, ignored

    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        """Return what the broker answers; a foreign message is no message."""
        answer = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]
        if command_name != "BRPOP" or not answer:
            return answer
        name, data = answer
        message = opened(self._key, name.decode(), data)
        if message is None:
            self._ignore("no seal" if len(data) < _SHORTEST or data[:1] in b"{[" else "wrong seal", name.decode())
            return None
        return name, message

    def _ignore(self, reason: str, queue: str) -> None:
        if reason not in self._ignored:  # a million of them are one line
            self._ignored.add(reason)
            log.warning("message.ignored", reason=reason, queue=queue)


class _Channel(RedisChannel):
    """Seals what it sends; reads what is sealed."""

    _ignored: set[str] = set()  # noqa: RUF012 - of the process, however often it connects

    @property
    def _key(self) -> bytes:
        connection: Any = self.connection.client
        return cast(str, connection.transport_options["seal_key"]).encode()

    def _get_client(self) -> Any:
        return partial(_Reader, key=self._key, ignored=self._ignored)

    def _put(self, queue: str, message: Any, **_options: Any) -> None:
        with self.conn_or_acquire() as client:
            client.lpush(queue, sealed(self._key, queue, dumps(message).encode()))


class Transport(RedisTransport):
    """kombu's Redis transport with sealed messages."""

    Channel = _Channel
    supports_batch_publish = False


TRANSPORT_ALIASES[_SCHEME] = f"{__name__}:Transport"
