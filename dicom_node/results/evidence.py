"""What a document is made from: highdicom is shown a few of the images, and all of them are written."""

from __future__ import annotations

from collections.abc import Iterable

from pydicom import Dataset

from dicom_node.results.header import Headers
from dicom_node.results.template import Template, leave_encoded, sequence, uid

_EVIDENCE = "CurrentRequestedProcedureEvidenceSequence"
_CLASS, _INSTANCE = "ReferencedSOPClassUID", "ReferencedSOPInstanceUID"
_SERIES = ("StudyInstanceUID", "SeriesInstanceUID")


def shown(headers: Headers, key_images: Iterable[int]) -> list[Dataset]:
    """Return the images that highdicom must see: the first, those that a document draws on, one of each series."""
    different = {each.like for each in headers.instances}
    return [headers.images[number] for number in sorted({0, *key_images, *different})]


def refer_to_all(document: Dataset, headers: Headers) -> None:
    """Name every image as evidence (PS3.3 C.17.2.3) where the document names those that were `shown`."""
    by_series: dict[tuple[str, ...], dict[str, str]] = {}
    for each in headers.instances:
        image = headers.images[each.like]
        names = tuple(str(image[keyword].value) for keyword in _SERIES)
        by_series.setdefault(names, {})[each.sop_instance_uid] = str(image.SOPClassUID)
    for study in document[_EVIDENCE].value:
        for series in study.ReferencedSeriesSequence:
            if named := by_series.get((str(study.StudyInstanceUID), str(series.SeriesInstanceUID))):
                item = Template(series.ReferencedSOPSequence[0], [_CLASS, _INSTANCE])
                items = (item.filled({_CLASS: uid(of), _INSTANCE: uid(name)}) for name, of in named.items())
                series["ReferencedSOPSequence"] = sequence("ReferencedSOPSequence", items)
                leave_encoded(series)
        leave_encoded(study)
