"""What is wrong with a settings file, as lines that name the key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from dicom_node.catalogue import suggestion
from dicom_node.config.settings import Settings
from dicom_node.config.tables import PATTERNS, Peer, RouteTable


def explained(error: ValidationError) -> Iterator[str]:
    """Yield a line for every problem: the key, what is wrong with it, and the nearest word that would do."""
    for problem in error.errors():
        *parents, last = problem["loc"]
        key = _key(problem["loc"])
        if problem["type"] == "extra_forbidden":
            yield f"{key}: no such key{suggestion(str(last), _keys_of(parents))}"
        elif problem["type"] == "literal_error":
            words = re.findall(r"'([^']*)'", str(problem.get("ctx", {}).get("expected", "")))
            yield f"{key}: {problem['input']!r} is not one of the words{suggestion(str(problem['input']), words)}"
        elif problem["type"] == "string_pattern_mismatch":
            yield f"{key}: {problem['input']!r} is not {PATTERNS.get(problem['ctx']['pattern'], 'of the right form')}"
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
