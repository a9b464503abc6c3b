"""The gate: has anything become dearer than `bounds.toml` allows?

Nothing is compared with another run, another machine, or a clock. Each check runs the node and a plain library on the
same input in turns, takes the least processor time that each ever needed, and divides. A busy machine makes both
dearer; it does not make one of them twice as dear in every one of the rounds.
"""

from __future__ import annotations

import os
import time
import tomllib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from io import BytesIO
from pathlib import Path

import highdicom as hd
import numpy as np
from pydicom import dcmread
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian

from bench import cases, receive
from bench.measure import OURS, Absent, alternate
from bench.peers import Node, Sender, StockPynetdicom
from dicom_node.findings import Code, Findings, Segment
from dicom_node.header import read_header
from dicom_node.images import read_source
from dicom_node.labelling import Context, ModelIdentity, derive_uid
from dicom_node.results import encode_all
from workers.volume import load

BOUNDS = Path(__file__).with_name("bounds.toml")
_SLICES, _SIZE = 60, 512


@dataclass(frozen=True, slots=True)
class Verdict:
    """One ratio against its bound; without a ratio, why it could not be measured."""

    name: str
    ratio: float | None
    at_most: float
    why: str = ""

    @property
    def held(self) -> bool:
        """Return whether the bound is kept; where CI is set, what cannot be measured is not."""
        return not os.environ.get("CI") if self.ratio is None else self.ratio <= self.at_most

    def __str__(self) -> str:
        """Return one line for people."""
        said = "held" if self.held else "BROKEN"
        measured = self.why if self.ratio is None else f"{self.ratio:.3f}"
        return f"{said}: {self.name}: {measured} (at most {self.at_most:g})"


def judge(path: Path = BOUNDS, checks: Mapping[str, Callable[[], float]] | None = None) -> list[Verdict]:
    """Measure what `bounds.toml` bounds, and compare."""
    bounds = tomllib.loads(path.read_text())
    return [_verdict(name, bound["at_most"], (checks or CHECKS)[name]) for name, bound in bounds.items()]


def _verdict(name: str, at_most: float, check: Callable[[], float]) -> Verdict:
    try:
        return Verdict(name, check(), at_most)
    except Absent as error:
        return Verdict(name, None, at_most, str(error))


def _ratio(ours: Callable[[], object], theirs: Callable[[], object], *, rounds: int = 5) -> float:
    measured = alternate({OURS: partial(_spent, ours), "theirs": partial(_spent, theirs)}, rounds)
    return measured[OURS][""].spread[0] / measured["theirs"][""].spread[0]


def _spent(do: Callable[[], object]) -> float:
    before = time.process_time()
    do()
    return time.process_time() - before


# -- the checks -----------------------------------------------------------------------------------------------------


def receiving() -> float:
    """Return the processor time of an instance in the real node, divided by that in stock pynetdicom."""
    files = cases.chest_ct(_SLICES, _SIZE)
    with receive.scratch() as folder, ExitStack() as stack:
        # no workers: they cost nothing here, but take a while to start
        node = stack.enter_context(Node(folder / "node", node='broker = "redis://127.0.0.1:1/0"'))
        stock = stack.enter_context(StockPynetdicom(folder / "stock"))
        sender = Sender(folder / "sender")
        runs = {
            each.name: partial(receive.received, each, sender, files, folder / "study", 1, 2 * _SLICES)
            for each in (node, stock)
        }
        measured = alternate(runs, 3)
    return measured[OURS]["processor"].spread[0] / measured[StockPynetdicom.name]["processor"].spread[0]


def reading_headers() -> float:
    """Return the processor time of the header of an arriving instance, divided by pydicom's of the same bytes."""
    contents = [path.read_bytes() for path in cases.chest_ct(_SLICES, _SIZE)]
    datasets = [content[144 + int.from_bytes(content[140:144], "little") :] for content in contents]

    def ours() -> None:
        for data in datasets:
            read_header(data, ExplicitVRLittleEndian)

    def theirs() -> None:
        for content in contents:
            header = dcmread(BytesIO(content), stop_before_pixels=True)
            _ = header.SOPInstanceUID, header.SeriesInstanceUID, header.ImagePositionPatient

    return _ratio(ours, theirs, rounds=10)


def loading() -> float:
    """Return the processor time from the files of a series to its voxels, divided by a plain pydicom loop's."""
    files = cases.chest_ct(_SLICES, _SIZE)

    def theirs() -> None:
        images = sorted((dcmread(path) for path in files), key=lambda each: float(each.ImagePositionPatient[2]))
        np.stack(
            [each.pixel_array * np.float32(each.RescaleSlope) + np.float32(each.RescaleIntercept) for each in images]
        )

    return _ratio(lambda: load(files), theirs)


def encoding() -> float:
    """Return the processor time of a BINARY SEG with five segments, as bytes, divided by plain highdicom's."""
    files = cases.chest_ct(_SLICES, _SIZE)
    source = read_source(files)
    mask = np.zeros((len(files), _SIZE, _SIZE), np.uint8)
    for number in range(1, 6):
        mask[5 * number : 5 * number + 30, 60 * number : 60 * number + 90, 50 * number : 50 * number + 120] = number
    kind = Code("49755003", "SCT", "Morphologically Abnormal Structure")
    mass = Code("4147007", "SCT", "Mass")
    segments = tuple(
        Segment(0, number, f"Mass {number}", kind, mass, (230, 90, 70), f"mass {number}", derive_uid(f"mass {number}"))
        for number in range(1, 6)
    )
    findings = Findings((mask,), segments, (), looked_for=(mass,))
    model = ModelIdentity("by_hand", "1.0.0", "By hand", "bench", digest="0" * 64)
    context = Context(model, input_digest="0" * 64, now=datetime.now(UTC))

    def ours() -> None:
        (result,) = encode_all(["seg"], findings, source, context)
        result.dataset.save_as(BytesIO(), enforce_file_format=True)

    def theirs() -> None:
        encoded = hd.seg.Segmentation(
            source_images=list(source.datasets),
            pixel_array=mask,
            segmentation_type="BINARY",
            segment_descriptions=[_described(each) for each in segments],
            series_instance_uid=derive_uid("series"),
            series_number=1,
            sop_instance_uid=derive_uid("instance"),
            instance_number=1,
            manufacturer="bench",
            manufacturer_model_name="bench",
            software_versions="1",
            device_serial_number="1",
        )
        encoded.save_as(BytesIO(), enforce_file_format=True)

    return _ratio(ours, theirs)


def _described(segment: Segment) -> hd.seg.SegmentDescription:
    return hd.seg.SegmentDescription(
        segment_number=segment.value,
        segment_label=segment.label,
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Mass,
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name="bench", version="1", family=codes.DCM.ArtificialIntelligence
        ),
    )


CHECKS: Mapping[str, Callable[[], float]] = {
    "receiving": receiving,
    "reading_headers": reading_headers,
    "loading": loading,
    "encoding": encoding,
}
