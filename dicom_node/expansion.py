"""Secrets in node.toml: `${env:NAME}` and `${file:/path}` stand for what is kept elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dicom_node.errors import SettingsError

_SHORTEST = 4  # characters of a secret; what is shorter is a number or a word, and would make holes in a message
_REFERENCE = re.compile(r"\$\{(env|file):([^}]+)\}")


def withheld(text: str, secrets: Iterable[str]) -> str:
    """Return a message without what references stood for: a secret in the wrong place is not quoted."""
    for secret in sorted((each for each in secrets if len(each) >= _SHORTEST), key=len, reverse=True):
        text = text.replace(secret, "[withheld]")
    return text


def expand(value: Any, *, where: str, base: Path, found: set[str], key: str = "") -> Any:
    """Return TOML data with every reference replaced; raise SettingsError that names the key of one that cannot be.

    A file's content is taken without the line break at its end; a relative path is relative to `base`. As a part of a
    URL it is percent-encoded, so that a password may have any character. What references stand for is added to `found`.
    """
    if isinstance(value, dict):
        return {
            name: expand(each, where=where, base=base, found=found, key=f"{key}.{name}".lstrip("."))
            for name, each in value.items()
        }
    if isinstance(value, list):
        return [
            expand(each, where=where, base=base, found=found, key=f"{key}[{number}]")
            for number, each in enumerate(value)
        ]
    if not isinstance(value, str):
        return value

    within_url = "://" in _REFERENCE.sub("", value)

    def referred(match: re.Match[str]) -> str:
        text = content(match)
        found.add(text)
        return quote(text, safe="") if within_url else text

    def content(match: re.Match[str]) -> str:
        kind, name = match.groups()
        try:
            return os.environ[name] if kind == "env" else (base / name).read_text(encoding="utf-8").rstrip("\r\n")
        except KeyError as error:
            raise SettingsError(f"{where}: {key}: there is no environment variable {name}") from error
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise SettingsError(f"{where}: {key}: {base / name}: {reason}") from error

    return _REFERENCE.sub(referred, value)
