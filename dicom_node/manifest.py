"""A model as data: what it is, what it accepts, what runs it and what its outputs mean."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from dicom_node.errors import SettingsError
from dicom_node.findings import Code
from dicom_node.services import RESULT_KIND_NAMES

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class CodeEntry(_Frozen):
    """A coded concept as written in a manifest."""

    value: str
    scheme: Literal["SCT", "DCM", "UCUM", "FMA", "RADLEX"]
    meaning: str

    def code(self) -> Code:
        """Return the value that findings carry."""
        return Code(self.value, self.scheme, self.meaning)


class Range(_Frozen):
    """Least and greatest allowed value, both inclusive."""

    min: float = float("-inf")
    max: float = float("inf")

    def __contains__(self, value: float) -> bool:
        """Return whether `value` lies within."""
        return self.min <= value <= self.max


class InputSlot(_Frozen):
    """One series that the model needs, and what it must be like.

    `body_part` is looked at only where the series states one: many scanners leave it empty.
    """

    modality: tuple[str, ...]
    body_part: tuple[str, ...] = ()
    image_type_excludes: tuple[str, ...] = ("LOCALIZER",)
    orientation: Literal["axial", "coronal", "sagittal", "any"] = "any"
    frames: Range = Range(min=1)
    in_plane_spacing: Range = Range()  # mm
    slice_spacing: Range = Range()  # mm


class SegmentOutput(_Frozen):
    """What one label value of a model's mask means."""

    label: str
    category: CodeEntry
    type: CodeEntry
    site: CodeEntry | None = None
    laterality: Literal["left", "right"] | None = None
    colour: tuple[int, int, int]
    measurements: tuple[Literal["volume", "diameter"], ...] = ("volume",)


class DetectionOutput(_Frozen):
    """What one kind of detection of a model means."""

    label: str
    category: CodeEntry
    finding: CodeEntry
    site: CodeEntry | None = None
    colour: tuple[int, int, int]


class MapOutput(_Frozen):
    """What one map of probabilities means."""

    label: str
    quantity: CodeEntry = CodeEntry(value="122157", scheme="DCM", meaning="Probability")


class Outputs(_Frozen):
    """Everything that the model may say: label value -> segment, detection name -> finding, map name -> map."""

    segments: Mapping[int, SegmentOutput] = Field(default_factory=dict)
    detections: Mapping[str, DetectionOutput] = Field(default_factory=dict)
    maps: Mapping[str, MapOutput] = Field(default_factory=dict)
    window: tuple[float, Annotated[float, Field(ge=1)]] | None = None  # centre, width: how a picture shows it best


class Weights(_Frozen):
    """A file of weights in the model's folder and the digest that it must have."""

    file: str
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Manifest(_Frozen):
    """One model: identity, input, runtime, outputs, intended use (`model.toml`, schema 1)."""

    schema_version: Literal[1] = Field(alias="schema")
    name: Name
    version: str
    title: str
    manufacturer: str
    licence: str
    intended_use: str
    publication: str = ""
    runtime: Name
    weights: Weights | None = None
    parameters: Mapping[str, float | int | str | bool] = Field(default_factory=dict)
    inputs: Mapping[Name, InputSlot]
    outputs: Outputs
    results: tuple[str, ...] = RESULT_KIND_NAMES  # the kinds that it may be told in; the peers choose among them

    @field_validator("version")
    @classmethod
    def _version_is_short(cls, value: str) -> str:
        if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,15}", value):
            raise ValueError("a version is 1 to 16 letters, digits, '.', '+' or '-'")
        return value

    @field_validator("inputs")
    @classmethod
    def _one_slot(cls, value: Mapping[str, InputSlot]) -> Mapping[str, InputSlot]:
        if len(value) != 1:
            raise ValueError("a model takes exactly one series in this version: write one [inputs.NAME] table")
        return value

    @property
    def input(self) -> InputSlot:
        """Return the one input slot."""
        return next(iter(self.inputs.values()))


def parse(text: str, *, where: str = "model.toml") -> Manifest:
    """Read a manifest from TOML `text`; raise SettingsError that names the key in the file `where`."""
    try:
        data: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{where}: not TOML: {error}") from error
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise SettingsError(f"{where}: {key}: {first['msg']}") from error
