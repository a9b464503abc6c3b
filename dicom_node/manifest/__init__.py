"""A model as data: what it is, what it accepts, how it is run, what its outputs mean and when to doubt them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, ValidationError, field_validator, model_validator

from dicom_node.errors import SettingsError
from dicom_node.manifest.entries import CodeEntry, Digest, Frozen, Name, Range, RelativePath
from dicom_node.manifest.inputs import InputSlot, Intensity
from dicom_node.manifest.outputs import (
    Boxes,
    ClassificationOutput,
    DetectionOutput,
    Guard,
    MapOutput,
    Outputs,
    SegmentOutput,
)
from dicom_node.services import RESULT_KIND_NAMES

__all__ = [
    "CONTAINED",
    "RUNS_CODE",
    "Boxes",
    "ClassificationOutput",
    "CodeEntry",
    "DetectionOutput",
    "Example",
    "Execution",
    "Guard",
    "InputSlot",
    "Intensity",
    "Limits",
    "Manifest",
    "MapOutput",
    "Origin",
    "Outputs",
    "PublishedFile",
    "Range",
    "SegmentOutput",
    "Together",
    "Weights",
    "parse",
]

Runtime = Literal[
    "algorithm",
    "torchscript",
    "state_dict",
    "onnx",
    "pt2",
    "monai_bundle",
    "nnunet",
    "totalsegmentator",
    "python",
]
RUNS_CODE: frozenset[str] = frozenset({"pt2", "monai_bundle", "nnunet", "totalsegmentator", "python"})
"""Formats that can execute code while they are loaded or run: they need `trusted = true`."""

CONTAINED: frozenset[str] = RUNS_CODE | {"torchscript", "state_dict", "onnx"}
"""Runtimes that work in a process of their own, without network and without the node's files."""


class Weights(Frozen):
    """A file that belongs to the model, and the digest that it must have.

    It lies in the model's folder, or is a file of the installed package `distribution`. With `url` it is fetched by
    `dicom-node models add`, never at run time.
    """

    file: RelativePath
    sha256: Digest
    url: str = ""
    distribution: str = ""


class PublishedFile(Frozen):
    """A file as its authors published it."""

    file: RelativePath
    url: Annotated[str, StringConstraints(pattern=r"^https://")]
    sha256: Digest


class Origin(Frozen):
    """Published files of another form, of which `dicom-node models add` makes the model's one file of weights."""

    converter: Literal["tfjs_meshnet"]
    files: Annotated[tuple[PublishedFile, ...], Field(min_length=1)]


class Architecture(Frozen):
    """The network that a state_dict fills: one of the node's own, or `monai.NAME` of monai.networks.nets."""

    name: str
    arguments: Mapping[str, Any] = Field(default_factory=dict)


class Together(Frozen):
    """How many studies are run in one forward at most, and how long the first waits for the others, in seconds."""

    size: Annotated[int, Field(ge=1, le=256)] = 1
    wait_seconds: Annotated[float, Field(ge=0, le=60)] = 0.2


class Execution(Frozen):
    """How a network is run: whole, or in windows of `patch` voxels that overlap; mirrored along `mirror` axes too."""

    patch: tuple[int, ...] = ()
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    blend: Literal["gaussian", "constant"] = "gaussian"
    mirror: tuple[Annotated[int, Field(ge=0, le=2)], ...] = ()
    batch: Annotated[int, Field(ge=1)] = 1
    autocast: bool = False
    channels_last: bool = False
    cpu_fallback: bool = True
    together: Together = Together()  # of networks of two dimensions: small inputs of several studies at once
    slicewise: bool = False  # a network of two dimensions over a volume: it sees plane after plane of the first axis


class Limits(Frozen):
    """What a contained model may use: memory of its process (MiB), seconds for one series, GPU memory (MiB)."""

    memory_megabytes: Annotated[int, Field(ge=256)] = 16384
    seconds: Annotated[float, Field(gt=0)] = 1800.0
    gpu_megabytes: Annotated[int, Field(ge=0)] = 4096


class Example(Frozen):
    """A series to try the model on, and what it must then say: `dicom-node models check` compares.

    The series is a `folder` of DICOM files in the model's folder, or a `phantom` that the node makes. `measurements`
    are keyed `LABEL: MEASUREMENT` as the report words them, in its units; `findings` are numbers of detections by
    name; `answers` are classes by name; `segments` are the labels that must be there.
    """

    folder: RelativePath | None = None
    phantom: Literal["thorax"] | None = None
    segments: tuple[str, ...] = ()
    measurements: Mapping[str, Range] = Field(default_factory=dict)
    findings: Mapping[str, Range] = Field(default_factory=dict)
    answers: Mapping[str, int] = Field(default_factory=dict)


Files = Annotated[tuple[Weights, ...], BeforeValidator(lambda value: (value,) if isinstance(value, Mapping) else value)]


class Manifest(Frozen):
    """One model: identity, input, runtime, outputs, guards, intended use (`model.toml`, schema 1)."""

    schema_version: Literal[1] = Field(alias="schema")
    name: Name
    version: str
    title: str
    manufacturer: str
    licence: str
    intended_use: str
    publication: str = ""
    runtime: Runtime
    trusted: bool = False
    seed: int = 0
    weights: Files = ()
    origin: Origin | None = None
    architecture: Architecture | None = None
    parameters: Mapping[str, float | int | str | bool] = Field(default_factory=dict)
    execution: Execution = Execution()
    limits: Limits = Limits()
    inputs: Mapping[Name, InputSlot] = Field(min_length=1, max_length=4)
    outputs: Outputs
    guards: Mapping[int, Guard] = Field(default_factory=dict)
    example: Example | None = None
    results: tuple[str, ...] = RESULT_KIND_NAMES  # the kinds that it may be told in; the peers choose among them

    @field_validator("version")
    @classmethod
    def _version_is_short(cls, value: str) -> str:
        if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,15}", value):
            raise ValueError("a version is 1 to 16 letters, digits, '.', '+' or '-'")
        return value

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Manifest:
        for problem in self._contradictions():
            raise ValueError(problem)
        return self

    def _contradictions(self) -> Iterator[str]:
        outputs = self.outputs
        if not (outputs.segments or outputs.detections or outputs.classifications or outputs.maps):
            yield "outputs: says nothing: write [outputs.segments.1], [outputs.detections.NAME] or another"
        if self.runtime in RUNS_CODE and not self.trusted:
            yield (
                f"trusted: runtime {self.runtime!r} can run code that is hidden in its files; write trusted = true "
                "where an administrator vouches for them"
            )
        if self.runtime == "state_dict" and self.architecture is None:
            yield "architecture: a state_dict needs the network that it fills: architecture = { name = ... }"
        if self.runtime in {"torchscript", "state_dict", "onnx", "pt2"} and not self.weights:
            yield f"weights: runtime {self.runtime!r} needs weights = {{ file = ..., sha256 = ... }}"
        if self.origin is not None and len(self.weights) != 1:
            yield "origin: makes one file of weights: write one weights = { file = ..., sha256 = ... }"
        if self.execution.together.size > 1 and not self._can_run_together:
            yield (
                "execution.together: only for networks of two dimensions, run whole, in a file of weights, that answer "
                "masks, maps or classes"
            )
        for value in self.guards:
            if value not in outputs.segments:
                yield f"guards.{value}: there is no [outputs.segments.{value}]"

    def codes(self) -> Iterator[tuple[str, CodeEntry]]:
        """Yield every coded concept with the key under which it stands."""
        yield from _codes(self.outputs, "outputs")

    @property
    def _can_run_together(self) -> bool:
        flat = self.input.dimensions == 2 or self.execution.slicewise
        whole = not self.execution.patch and len(self.inputs) == 1
        of_a_file = self.runtime in {"torchscript", "state_dict", "onnx", "pt2"}
        return flat and whole and of_a_file and not self.outputs.detections

    @property
    def input(self) -> InputSlot:
        """Return the first input slot: its series is the one that results are drawn on."""
        return next(iter(self.inputs.values()))


def _codes(value: Any, key: str) -> Iterator[tuple[str, CodeEntry]]:
    if isinstance(value, CodeEntry):
        yield key, value
    elif isinstance(value, Frozen):
        for name in type(value).model_fields:
            yield from _codes(getattr(value, name), f"{key}.{name}")
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _codes(entry, f"{key}.{name}")


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
        message = first["msg"].removeprefix("Value error, ")
        raise SettingsError(f"{where}: {key}: {message}" if key else f"{where}: {message}") from error
