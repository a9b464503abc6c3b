"""Probabilities for each voxel as Parametric Maps (PS3.3 A.75)."""

from __future__ import annotations

from collections.abc import Sequence

import highdicom as hd
import numpy as np
from pydicom import Dataset
from pydicom.sr.coding import Code as PydicomCode

from dicom_node.findings import Map
from dicom_node.labelling import MANUFACTURER_MODEL_NAME
from dicom_node.results import Work
from dicom_node.results.header import code, complete, made_by, on_frames

_SERIES_OFFSET = 18
_NO_UNITS = PydicomCode("1", "UCUM", "no units")


def encode(work: Work) -> Sequence[Dataset]:
    """Return one map for each that the model gave; none for images without a place in the patient."""
    if "FrameOfReferenceUID" not in work.headers.images[0]:
        return []
    return [_encode(number, given, work) for number, given in enumerate(work.findings.maps)]


def _encode(number: int, given: Map, work: Work) -> Dataset:
    context = work.context
    mapping = hd.pm.RealWorldValueMapping(
        lut_label="PROBABILITY",
        lut_explanation=given.label[:64],
        unit=_NO_UNITS,
        value_range=(0.0, 1.0),
        slope=1.0,
        intercept=0.0,
        quantity_definition=code(given.quantity),
    )
    encoded = hd.pm.ParametricMap(
        source_images=work.headers.images,
        pixel_array=on_frames(np.clip(given.values, 0.0, 1.0).astype(np.float32), work.source),
        series_instance_uid=context.uid("pm series", number),
        series_number=context.series_number,
        sop_instance_uid=context.uid("pm", number),
        manufacturer_model_name=MANUFACTURER_MODEL_NAME,
        software_versions=context.software_versions[0],
        device_serial_number=context.ae_title,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[hd.VOILUTTransformation(window_center=0.5, window_width=1.0)],
        content_label=context.content_label,
        content_description=context.disclaimer[:64],
        **made_by(context),
    )
    encoded.ContentCreatorName = None  # type 2: no person made it
    return complete(encoded, work.headers, context, series_offset=_SERIES_OFFSET + number)
