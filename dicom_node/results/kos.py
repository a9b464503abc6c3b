"""The key images as a Key Object Selection Document (PS3.3 A.35.4)."""

from __future__ import annotations

from collections.abc import Sequence

from highdicom import ko
from pydicom import Dataset
from pydicom.sr.coding import Code as PydicomCode

from dicom_node.results import Work
from dicom_node.results.header import complete, made_by, observer

_SERIES_OFFSET = 16
_OF_INTEREST = PydicomCode("113000", "DCM", "Of Interest")


def encode(work: Work) -> Sequence[Dataset]:
    """Return a list of the images that findings, or else structures, are best seen on; none where there is none."""
    findings = work.findings
    boxes = [finding.box for finding in findings.findings] or [
        work.layers.box_of(segment) for segment in findings.segments
    ]
    if not boxes:
        return []
    instances = sorted({work.source.frames[box.frame].instance for box in boxes})
    images = [work.headers.images[instance] for instance in instances]
    content = ko.KeyObjectSelection(
        document_title=_OF_INTEREST,
        referenced_objects=images,
        observer_device_context=observer(work.context),
        description=f"{work.context.series_description()}. {work.context.disclaimer}",
    )
    document = ko.KeyObjectSelectionDocument(
        evidence=images,
        content=content,
        series_instance_uid=work.context.uid("kos series"),
        series_number=work.context.series_number,
        sop_instance_uid=work.context.uid("kos"),
        **made_by(work.context),
    )
    return [complete(document, work.headers, work.context, series_offset=_SERIES_OFFSET)]
