"""One file for each result kind, every one with encode(work)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydicom import Dataset

from dicom_node.errors import ModelRefused
from dicom_node.findings import Findings
from dicom_node.forms import DEPENDS_ON_FORM, UNSEGMENTED, Form
from dicom_node.labelling import Context
from dicom_node.results.header import Headers, prepared
from dicom_node.results.layers import Layers
from dicom_node.services import RESULT_KIND_NAMES
from dicom_node.source import Source

ORDER = RESULT_KIND_NAMES
"""The kinds there are, a kind after those that it refers to; the name is the module's."""

Made = Mapping[str, Sequence[Dataset]]


@dataclass(frozen=True, slots=True)
class Work:
    """Everything that an encoder is given: what to say, about which images, as whom, and what is made already."""

    findings: Findings
    source: Source
    headers: Headers
    context: Context
    form: Form
    made: Made
    layers: Layers


class Encoder(Protocol):
    """What each module of this package offers."""

    def encode(self, work: Work) -> Sequence[Dataset]:
        """Return the objects of this kind; none where there is nothing to say in it."""
        ...


@dataclass(frozen=True, slots=True)
class Result:
    """One encoded object, its kind and the key of its form; None where it is the same in every form."""

    kind: str
    dataset: Dataset
    form: str | None = None


def encode_all(
    kinds: Sequence[str], findings: Findings, source: Source, context: Context, forms: Sequence[Form] = (Form(),)
) -> list[Result]:
    """Encode findings in each of `kinds`; those that depend on the form once for each of `forms`.

    Raises:
        ModelRefused: a kind that does not exist is asked for.
    """
    if unknown := set(kinds) - set(ORDER):
        raise ModelRefused(f"no result kind {', '.join(sorted(unknown))} (there is: {', '.join(ORDER)})")
    headers, layers = prepared(source), Layers(findings)
    results: list[Result] = []
    for form in dict.fromkeys(forms):
        made: dict[str, Sequence[Dataset]] = {}
        for kind in (kind for kind in ORDER if kind in kinds and kind in DEPENDS_ON_FORM):
            made[kind] = encoder(kind).encode(
                Work(findings, source, headers, context.in_form(form.key), form, dict(made), layers)
            )
        results += [Result(kind, dataset, form.key) for kind, datasets in made.items() for dataset in datasets]
    for kind in (kind for kind in ORDER if kind in kinds and kind not in DEPENDS_ON_FORM):
        objects = encoder(kind).encode(Work(findings, source, headers, context, UNSEGMENTED, {}, layers))
        results += [Result(kind, dataset) for dataset in objects]
    return results


def encoder(kind: str) -> Encoder:
    """Return the module that encodes `kind`."""
    module: Encoder = importlib.import_module(f"{__name__}.{kind}")
    return module
