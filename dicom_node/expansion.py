"""Secrets in node.toml: `${env:NAME}` and `${file:/path}` stand for what is kept elsewhere."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dicom_node.errors import SettingsError

_REFERENCE = re.compile(r"\$\{(env|file):([^}]+)\}")


def expand(value: Any, *, where: str, base: Path, key: str = "") -> Any:
    """Return TOML data with every reference replaced; raise SettingsError that names the key of one that cannot be.

    A file's content is taken without the line break at its end; a relative path is relative to `base`. As a part of a
    URL it is percent-encoded, so that a password may have any character.
    """
    if isinstance(value, dict):
        return {
            name: expand(each, where=where, base=base, key=f"{key}.{name}".lstrip(".")) for name, each in value.items()
        }
    if isinstance(value, list):
        return [expand(each, where=where, base=base, key=f"{key}[{number}]") for number, each in enumerate(value)]
    if not isinstance(value, str):
        return value

    within_url = "://" in _REFERENCE.sub("", value)

    def referred(found: re.Match[str]) -> str:
        text = content(found)
        return quote(text, safe="") if within_url else text

    def content(found: re.Match[str]) -> str:
        kind, name = found.groups()
        try:
            return os.environ[name] if kind == "env" else (base / name).read_text(encoding="utf-8").rstrip("\r\n")
        except KeyError as error:
            raise SettingsError(f"{where}: {key}: there is no environment variable {name}") from error
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise SettingsError(f"{where}: {key}: {base / name}: {reason}") from error

    return _REFERENCE.sub(referred, value)
