"""What every table of a manifest is made of: frozen tables, codes, ranges, axes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints

from dicom_node.findings import Code

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

_OPPOSITE = {"L": "R", "R": "L", "P": "A", "A": "P", "S": "I", "I": "S"}


class Frozen(BaseModel):
    """A table that has the keys it names and no others, and never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class CodeEntry(Frozen):
    """A coded concept as written in a manifest."""

    value: str
    scheme: Literal["SCT", "DCM", "UCUM", "FMA", "RADLEX"]
    meaning: str

    def code(self) -> Code:
        """Return the value that findings carry."""
        return Code(self.value, self.scheme, self.meaning)


class Range(Frozen):
    """Least and greatest allowed value, both inclusive."""

    min: float = float("-inf")
    max: float = float("inf")

    def __contains__(self, value: float) -> bool:
        """Return whether `value` lies within."""
        return self.min <= value <= self.max


def _three_directions(value: str) -> str:
    if len(value) != 3 or {frozenset((letter, _OPPOSITE.get(letter, ""))) for letter in value} != {
        frozenset("LR"),
        frozenset("PA"),
        frozenset("SI"),
    }:
        raise ValueError("axes are three letters, one of each pair L/R, P/A, S/I: the way each array axis runs")
    return value


Axes = Annotated[str, AfterValidator(_three_directions)]
"""The patient direction in which each axis of an array runs: SPL is a stack of axial slices from the feet up."""


def _inside(value: str) -> str:
    if not value or value.startswith("/") or "\\" in value or ".." in value.split("/"):
        raise ValueError("a file's path is relative to the model's folder and does not leave it")
    return value


RelativePath = Annotated[str, AfterValidator(_inside)]
