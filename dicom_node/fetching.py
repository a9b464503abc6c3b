"""Files from where they were published: over https, whole, and the ones that were meant, or not at all."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO

from dicom_node.errors import ModelRefused, Unavailable

_CHUNK = 1 << 20
_TIMEOUT = 60.0  # seconds without a byte
_LARGEST = 16 << 30  # bytes

Progress = Callable[[int, int], None]
"""Called with bytes so far, and bytes in all (0 where the server does not say)."""


def fetch(url: str, target: Path, sha256: str, progress: Progress) -> None:
    """Write what is at `url` to `target`, in one step and only if its digest is `sha256`.

    Raises:
        Unavailable: the server does not answer, or stopped in the middle.
        ModelRefused: the address is not https, or what is there is another file.
    """
    _require_https(url)
    part = target.with_name(f".{target.name}.part")
    try:
        digest = _download(url, part, progress)
        if digest != sha256:
            raise ModelRefused(f"{url} is not the file that the manifest names: sha256 {digest}, wanted {sha256}")
        os.replace(part, target)
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise Unavailable(f"{url}: {getattr(error, 'reason', None) or type(error).__name__}") from error
    finally:
        part.unlink(missing_ok=True)


def _require_https(url: str) -> None:
    if not url.lower().startswith("https://"):
        raise ModelRefused(f"{url}: only https is fetched")


class OnlyHttps(urllib.request.HTTPRedirectHandler):
    """Follows a server that sends us elsewhere, but not out of https."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """Return the request for the other place; raise ModelRefused where that is not https."""
        _require_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, part: Path, progress: Progress) -> str:
    digest, done = hashlib.sha256(), 0
    with urllib.request.build_opener(OnlyHttps).open(url, timeout=_TIMEOUT) as answer, part.open("wb") as file:
        total = int(answer.headers.get("Content-Length") or 0)
        while chunk := answer.read(_CHUNK):
            done += len(chunk)
            if done > _LARGEST:
                raise ModelRefused(f"{url}: more than {_LARGEST >> 30} GiB")
            digest.update(chunk)
            file.write(chunk)
            progress(done, total)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
