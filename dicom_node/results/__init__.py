"""One file for each result kind, every one with encode(findings, source, context, made)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydicom import Dataset

from dicom_node.errors import ModelRefused
from dicom_node.findings import Findings
from dicom_node.labelling import Context
from dicom_node.source import Source

ORDER = ("seg", "sr")
"""The kinds there are, a kind after those that it refers to; the name is the module's."""

Made = Mapping[str, Sequence[Dataset]]


class Encoder(Protocol):
    """What each module of this package offers."""

    def encode(self, findings: Findings, source: Source, context: Context, made: Made) -> Sequence[Dataset]:
        """Return the objects of this kind; none where there is nothing to say in it."""
        ...


@dataclass(frozen=True, slots=True)
class Result:
    """One encoded object and its kind."""

    kind: str
    dataset: Dataset


def encode_all(kinds: Sequence[str], findings: Findings, source: Source, context: Context) -> list[Result]:
    """Encode findings in each of `kinds`, those that others refer to first.

    Raises:
        ModelRefused: a kind that does not exist is asked for.
    """
    if unknown := set(kinds) - set(ORDER):
        raise ModelRefused(f"no result kind {', '.join(sorted(unknown))} (there is: {', '.join(ORDER)})")
    made: dict[str, Sequence[Dataset]] = {}
    for kind in ORDER:
        if kind in kinds:
            made[kind] = encoder(kind).encode(findings, source, context, made)
    return [Result(kind, dataset) for kind, datasets in made.items() for dataset in datasets]


def encoder(kind: str) -> Encoder:
    """Return the module that encodes `kind`."""
    module: Encoder = importlib.import_module(f"{__name__}.{kind}")
    return module
