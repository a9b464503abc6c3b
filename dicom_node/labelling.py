"""What a result says about itself: that it is AI, which model, which version, from which input, unverified."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal

from dicom_node import __version__

MANUFACTURER = "dicom-node"
MANUFACTURER_MODEL_NAME = "dicom-node"
"""(0008,1090) of every object that the node writes; how it knows its own when they come back."""

LONG_STRING = 64  # characters in a VR of LO (PS3.5 Table 6.2-1)


def derive_uid(*parts: str) -> str:
    """Return the same UID for the same `parts`, always: 2.25 and 122 bits of SHA-256 as a UUID (PS3.5 B.2)."""
    digest = hashlib.sha256("\x00".join(parts).encode()).digest()
    number = int.from_bytes(digest[:16], "big")
    number = number & ~(0xF << 76) & ~(0x3 << 62) | (0x8 << 76) | (0x2 << 62)
    return f"2.25.{number}"


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model made a result; `digest` is the SHA-256 (hex) of its manifest, weights and code."""

    name: str
    version: str
    title: str
    manufacturer: str
    digest: str

    @property
    def device_uid(self) -> str:
        """Return a UID that changes whenever the model does (IHE AIR 6.5.3.1)."""
        return derive_uid("device", self.name, self.version, self.digest)


@dataclass(frozen=True, slots=True)
class Predecessor:
    """An earlier version of the same report, to be superseded (PS3.3 C.17.2.3)."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str
    form: str | None = ""


@dataclass(frozen=True, slots=True)
class Context:
    """Everything but the findings and the images that goes into a result object.

    `input_digest` names the exact input: the sorted SOP Instance UIDs and digests of the source instances.
    `series_number` is the first that this model may use; each result kind adds its own small offset.
    `form` tells apart sets of results that say the same in other objects; it is part of their UIDs.
    """

    model: ModelIdentity
    input_digest: str
    now: datetime  # with a time zone
    series_number: int = 9000
    qualification: Literal["RESEARCH", "PRODUCT", "SERVICE"] = "RESEARCH"
    disclaimer: str = "Not for diagnosis. AI result, not verified by a physician."
    ae_title: str = "DICOM_NODE"
    predecessors: tuple[Predecessor, ...] = ()
    form: str = ""
    parameters: dict[str, str] = field(default_factory=dict)

    def uid(self, role: str, ordinal: int = 0) -> str:
        """Return the UID of one thing in this result set; the same input and model give the same UID."""
        made = (role, str(ordinal), self.model.name, self.model.version, self.model.digest, self.input_digest)
        return derive_uid(*made, *([self.form] if self.form else []))

    def in_form(self, form: str) -> Context:
        """Return the context of the results in another form: UIDs of their own, predecessors of the same form."""
        earlier = tuple(report for report in self.predecessors if report.form == form)
        return replace(self, form=form, predecessors=earlier)

    def series_description(self) -> str:
        """Return "AI <title> <version> - RESEARCH", at most 64 characters."""
        tail = f" {self.model.version}" + ("" if self.qualification == "PRODUCT" else f" - {self.qualification}")
        return f"AI {self.model.title}"[: LONG_STRING - len(tail)].rstrip() + tail

    @property
    def content_label(self) -> str:
        """Return the model's name as a Code String (PS3.5 Table 6.2-1)."""
        return self.model.name.upper()[:16]

    @property
    def software_versions(self) -> tuple[str, ...]:
        """Return what goes into Software Versions (0018,1020)."""
        return (f"dicom-node {__version__}", f"{self.model.name} {self.model.version}")


def digest_of_input(instances: Iterable[tuple[str, str]]) -> str:
    """Return one SHA-256 (hex) over `(SOP Instance UID, digest of its bytes)` pairs, whatever their order."""
    digest = hashlib.sha256()
    for sop_instance_uid, each in sorted(instances):
        digest.update(f"{sop_instance_uid} {each}\n".encode())
    return digest.hexdigest()
