"""One Secondary Capture picture of the result: key slices, legend, disclaimer (PS3.3 A.8.1).

What shows where nothing else does, so everything that matters is in the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import highdicom as hd
from pydicom import Dataset
from pydicom.sr.coding import Code as PydicomCode

from dicom_node.results import Work
from dicom_node.results.header import complete, made_by
from dicom_node.results.page import page, shown_frames

_SERIES_OFFSET = 14
_DERIVED_FROM = PydicomCode("121324", "DCM", "Source Image for Image Processing Operation")


def encode(work: Work) -> Sequence[Dataset]:
    """Return the picture; also of a negative result, which must be as visible as a positive one.

    Raises:
        ResultRefused: the source has no pixels at hand.
    """
    found = work.findings
    if not (found.segments or found.findings or found.looked_for or found.answers):
        return []
    context, stated = work.context, work.headers.stated
    made = hd.sc.SCImage(
        pixel_array=page(work.findings, work.source, context),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "P"),
        study_instance_uid=stated.StudyInstanceUID,
        series_instance_uid=context.uid("sc series"),
        series_number=context.series_number,
        sop_instance_uid=context.uid("sc"),
        **made_by(context),
    )
    made.PatientOrientation = []  # several images, each with letters of its own
    made.ConversionType = "WSD"
    made.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    made.BurnedInAnnotation = "YES"
    made.DerivationDescription = f"{context.series_description()}. {context.disclaimer}"[:1024]
    made.SourceImageSequence = [_source_image(frame, work) for frame in shown_frames(work.findings, work.source)]
    _tell_loss(made, work.headers.images[0])
    return [complete(made, work.headers, context, series_offset=_SERIES_OFFSET)]


def _source_image(frame: int, work: Work) -> Dataset:
    place = work.source.frames[frame]
    image = work.source.datasets[place.instance]
    item = Dataset()
    item.ReferencedSOPClassUID = image.SOPClassUID
    item.ReferencedSOPInstanceUID = image.SOPInstanceUID
    if int(image.get("NumberOfFrames") or 1) > 1:
        item.ReferencedFrameNumber = place.frame_number
    item.PurposeOfReferenceCodeSequence = [hd.sr.CodedConcept.from_code(_DERIVED_FROM)]
    return item


def _tell_loss(made: Dataset, image: Dataset) -> None:
    """Say that what is shown was once compressed with loss (PS3.3 C.7.6.1.1.5)."""
    for keyword in ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"):
        if keyword in image:
            made[keyword] = image[keyword]
