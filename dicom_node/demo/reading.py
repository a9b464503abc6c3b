"""Result objects read back as a viewer would: from the files alone, by the codes of TID 1500."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread
from rich.table import Table

from dicom_node.results.drawing import written

_IMAGING_MEASUREMENTS = "126010"
_MEASUREMENT_GROUP = "125007"
_TRACKING_IDENTIFIER = "112039"
_TRACKING_UNIQUE_IDENTIFIER = "112040"
_FINDING = "121071"
_FINDING_SITE = "363698007"
_LATERALITY = "272741003"
_ABSENT = "272519000"


@dataclass(frozen=True, slots=True)
class Outline:
    """A closed polygon on one source image, in DICOM image coordinates (column, row)."""

    sop_instance_uid: str
    points: tuple[tuple[float, float], ...]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Return left, top, right, bottom."""
        columns, rows = zip(*self.points, strict=True)
        return min(columns), min(rows), max(columns), max(rows)


@dataclass(slots=True)
class Group:
    """The measurement groups of one tracking UID, taken together."""

    label: str
    finding: str = ""
    site: str = ""
    numbers: dict[str, tuple[float, str]] = field(default_factory=dict)
    outline: Outline | None = None
    segment: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """One SR with the SEG that it refers to."""

    description: str
    findings: tuple[Group, ...]
    segments: tuple[Group, ...]
    is_negative: bool
    segmentation: Dataset | None


def read_report(path: Path, segs: Sequence[Path]) -> Report:
    """Read one TID 1500 report; groups that carry a confidence are findings, the others describe segments."""
    dataset = dcmread(path)
    groups = _groups(dataset)
    segmentations = {str(seg.SOPInstanceUID): seg for seg in map(dcmread, segs)}
    referenced = next((group.segment[0] for group in groups if group.segment), None)
    detected = [group for group in groups if _confidence(group)]
    return Report(
        description=str(dataset.SeriesDescription),
        findings=tuple(detected),
        segments=tuple(group for group in groups if not _confidence(group)),
        is_negative=_ABSENT in _codes(dataset),
        segmentation=segmentations.get(referenced or ""),
    )


def tables(reports: Sequence[Report]) -> Iterator[Table]:
    """Yield one table for each report."""
    for report in reports:
        if report.segments:
            yield _segment_table(report)
        if report.findings or not report.segments:
            yield _finding_table(report)


def _segment_table(report: Report) -> Table:
    made = _table(report.description, "segment", "volume #", "slices #")
    for group in report.segments:
        made.add_row(group.label, _number(group, "Volume"), str(_frames(report.segmentation, group)))
    return made


def _finding_table(report: Report) -> Table:
    made = _table(
        report.description, "finding", "where", "centre on its key slice #", "diameter #", "volume #", "confidence #"
    )
    for group in report.findings:
        left, top, right, bottom = group.outline.box if group.outline else (0.0,) * 4
        centre = f"column {(left + right) / 2:.0f}, row {(top + bottom) / 2:.0f}"
        made.add_row(
            group.label,
            group.site,
            centre,
            _number(group, "Diameter"),
            _number(group, "Volume"),
            _number(group, "Certainty"),
        )
    if report.is_negative:
        made.add_row("[green]nothing found[/green]", "", "", "", "", "")
    return made


def _table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", show_edge=False)
    for column in columns:
        made.add_column(column.removesuffix(" #"), justify="right" if column.endswith(" #") else "left")
    return made


def _number(group: Group, word: str) -> str:
    for name, (value, unit) in group.numbers.items():
        if word.lower() in name.lower():
            return f"{written(value)} {unit}"
    return ""


def _confidence(group: Group) -> str:
    return _number(group, "Certainty")


def _frames(segmentation: Dataset | None, group: Group) -> int:
    if segmentation is None or group.segment is None:
        return 0
    return int(np.sum(frame_segments(segmentation) == group.segment[1]))


def frame_segments(segmentation: Dataset) -> npt.NDArray[np.int64]:
    """Return the segment number of every frame of a BINARY SEG."""
    return np.array(
        [
            int(functional_group(segmentation, frame, "SegmentIdentificationSequence").ReferencedSegmentNumber)
            for frame in segmentation.PerFrameFunctionalGroupsSequence
        ]
    )


def functional_group(segmentation: Dataset, frame: Dataset, keyword: str) -> Dataset:
    """Return a frame's functional group, which stands with all frames where it is the same for all (PS3.3 C.7.6.16)."""
    groups = frame if keyword in frame else segmentation.SharedFunctionalGroupsSequence[0]
    item: Dataset = groups[keyword][0]
    return item


# -- the content tree -----------------------------------------------------------------------------------------


def _groups(dataset: Dataset) -> list[Group]:
    merged: dict[str, Group] = {}
    for container in _children(dataset, _IMAGING_MEASUREMENTS):
        for item in _children(container, _MEASUREMENT_GROUP):
            _merge(merged, item)
    return list(merged.values())


def _merge(merged: dict[str, Group], item: Dataset) -> None:
    uid = next((str(child.UID) for child in _children(item, _TRACKING_UNIQUE_IDENTIFIER)), "")
    label = next((str(child.TextValue) for child in _children(item, _TRACKING_IDENTIFIER)), "")
    group = merged.setdefault(uid, Group(label))
    for child in item.get("ContentSequence", ()):
        _read(group, child)


def _read(group: Group, child: Dataset) -> None:
    name = child.ConceptNameCodeSequence[0] if "ConceptNameCodeSequence" in child else Dataset()
    if child.ValueType == "NUM":
        measured = child.MeasuredValueSequence[0]
        unit = measured.MeasurementUnitsCodeSequence[0].CodeValue
        group.numbers[name.CodeMeaning] = (float(measured.NumericValue), unit)
    elif child.ValueType == "SCOORD":
        data = [float(value) for value in child.GraphicData]
        image = child.ContentSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        group.outline = Outline(str(image), tuple(zip(data[::2], data[1::2], strict=True)))
    elif child.ValueType == "IMAGE" and "ReferencedSegmentNumber" in child.ReferencedSOPSequence[0]:
        reference = child.ReferencedSOPSequence[0]
        number = np.atleast_1d(np.array(reference.ReferencedSegmentNumber))[0]
        group.segment = (str(reference.ReferencedSOPInstanceUID), int(number))
    elif child.ValueType == "CODE" and name.get("CodeValue") == _FINDING:
        group.finding = child.ConceptCodeSequence[0].CodeMeaning
    elif child.ValueType == "CODE" and name.get("CodeValue") == _FINDING_SITE:
        sides = [side.ConceptCodeSequence[0].CodeMeaning for side in _children(child, _LATERALITY)]
        group.site = " ".join([*sides, child.ConceptCodeSequence[0].CodeMeaning]).lower()


def _children(item: Dataset, code: str) -> list[Dataset]:
    return [
        child
        for child in item.get("ContentSequence", ())
        if "ConceptNameCodeSequence" in child and child.ConceptNameCodeSequence[0].get("CodeValue") == code
    ]


def _codes(item: Dataset) -> set[str]:
    """Return every code value that is a value somewhere in the tree."""
    own = {code.CodeValue for code in item.get("ConceptCodeSequence", ())}
    return own.union(*(_codes(child) for child in item.get("ContentSequence", ())))
