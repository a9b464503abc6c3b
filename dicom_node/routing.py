"""Which models run on a series and who gets the results: the operator's sentences, matched."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum


class Priority(IntEnum):
    """How urgent a route is: what is more urgent is run first, and a model that runs gives way to it."""

    URGENT = 0
    NORMAL = 1
    BACKGROUND = 2


CALLING_AE_TITLE = "calling_ae_title"
"""The one key of `when` that is not a DICOM keyword: who sent the series."""


@dataclass(frozen=True, slots=True)
class Route:
    """One sentence: when the series looks like this, run these models and send their results there.

    Each value of `when` is a regular expression that must match the whole value, in any case; of an element
    with several values it is enough that one matches, or all of them joined by a backslash.
    """

    name: str
    when: Mapping[str, str]
    run: tuple[str, ...]
    send_to: tuple[str, ...]
    priority: Priority = Priority.NORMAL


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Why a route does not match: the key, what it asks for and what the series has."""

    key: str
    wanted: str
    found: str


@dataclass(frozen=True, slots=True)
class Order:
    """One model to run on a series, with all that want its results; of several priorities the most urgent counts."""

    model: str
    send_to: tuple[str, ...]
    routes: tuple[str, ...]
    priority: Priority = Priority.NORMAL


Attributes = Mapping[str, Sequence[str]]
"""DICOM keyword (or `calling_ae_title`) -> its values as text; absent and empty are the same."""


def mismatches(route: Route, attributes: Attributes) -> tuple[Mismatch, ...]:
    """Return every condition of `route` that the series does not meet; none means that it matches."""
    return tuple(
        Mismatch(key, wanted, "\\".join(attributes.get(key, ())))
        for key, wanted in route.when.items()
        if not _matches(wanted, attributes.get(key, ()))
    )


def _matches(pattern: str, values: Sequence[str]) -> bool:
    candidates = [*values, "\\".join(values)]
    return any(re.fullmatch(pattern, value, re.IGNORECASE) for value in candidates)


def match(routes: Sequence[Route], attributes: Attributes) -> tuple[Order, ...]:
    """Return what to run: one order per model, its peers and routes collected from all routes that match."""
    wanted: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    priorities: dict[str, Priority] = {}
    for route in routes:
        if mismatches(route, attributes):
            continue
        for model in route.run:
            peers, names = wanted.setdefault(model, ({}, {}))
            peers.update(dict.fromkeys(route.send_to))
            names[route.name] = None
            priorities[model] = min(priorities.get(model, route.priority), route.priority)
    return tuple(
        Order(model, tuple(peers), tuple(names), priorities[model]) for model, (peers, names) in wanted.items()
    )
