"""From masks to the bytes of a segmentation: the node, and plain highdicom."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import highdicom as hd
import numpy as np
import numpy.typing as npt
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid

from bench import cases, large
from bench.large import context, findings
from bench.measure import OURS, Figure, alternate, figure, processor_seconds
from dicom_node.forms import Form
from dicom_node.images import read_source
from dicom_node.results import encode_all
from dicom_node.source import Source
from dicom_node.spool import Spool
from workers.volume import load

_QUICK = (40, 256)
_HIGHDICOM = "highdicom"
_HALF = 0.5  # of MONAI Deploy's time: its operator has highdicom make the SEG, 0.85 s where that was measured
_SYNTAXES = {"BINARY": ExplicitVRLittleEndian, "LABELMAP": RLELossless}


def figures(*, rounds: int, quick: bool) -> list[Figure]:
    """Return the processor time of segmentations of 5 and of 104 structures, as bits and as label maps."""
    source = read_source(cases.chest_ct(*_QUICK) if quick else cases.chest_ct())
    made = []
    for count in (5,) if quick else (5, 104):
        mask = _mask(count, (len(source.frames), int(source.datasets[0].Rows), int(source.datasets[0].Columns)))
        made += [_measured(kind, count, mask, source, rounds) for kind in ("BINARY", "LABELMAP")]
    return [*made, _whole(rounds, quick), *large.figures(quick=quick)]


def _whole(rounds: int, quick: bool) -> Figure:
    """Return the processor time of a worker from labels to files that are checked and in their places."""
    files = cases.chest_ct(*_QUICK) if quick else cases.chest_ct()
    shape = (len(files), *(_QUICK[1:] if quick else (512,)) * 2)
    mask = _mask(5, (shape[0], shape[1], shape[2]))
    found, made_by = findings(mask, 5), context()

    def ours() -> float:
        source = load(files).source  # of which no header but the first has been read
        with tempfile.TemporaryDirectory() as folder:
            return processor_seconds(lambda: large.write(source, found, made_by, Form(), Spool(Path(folder))))

    read = read_source(files)

    def theirs() -> float:
        return processor_seconds(lambda: _by_highdicom("BINARY", 5, mask, read))

    for first in (ours, theirs):
        first()  # the libraries read their tables
    return figure(
        alternate({OURS: ours, _HIGHDICOM: theirs}, rounds),
        f"write: SEG and SR of 5 structures on {len(files)} slices",
        "s",
        bars={_HIGHDICOM: _HALF},
        note="processor time, from labels to files that have been read back, checked and synced; highdicom: to the "
        "bytes of the SEG alone, which is what MONAI Deploy's operator has it make",
    )


def _measured(kind: str, count: int, mask: npt.NDArray[np.uint8], source: Source, rounds: int) -> Figure:
    found, made_by, form = findings(mask, count), context(), Form(kind)  # type: ignore[arg-type]

    def ours() -> None:
        for result in encode_all(["seg"], found, source, made_by, [form]):
            result.dataset.save_as(BytesIO(), enforce_file_format=True)

    def theirs() -> None:
        _by_highdicom(kind, count, mask, source)

    for first in (ours, theirs):
        first()  # the libraries read their tables when they are first used
    runs = {OURS: lambda: processor_seconds(ours), _HIGHDICOM: lambda: processor_seconds(theirs)}
    return figure(
        alternate(runs, rounds),
        f"encode: {kind} of {count} structures on {len(mask)} slices",
        "s",
        bars={_HIGHDICOM: 1.0},
        note="processor time, from labels to the bytes of the file",
    )


def _mask(count: int, shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """Return ellipsoids of many sizes at places that are the same in every run; later ones hide earlier ones."""
    chance = np.random.default_rng(0)
    grid = np.ogrid[tuple(slice(size) for size in shape)]
    mask = np.zeros(shape, np.uint8)
    for value in range(1, count + 1):
        centre = [chance.uniform(0.15, 0.85) * size for size in shape]
        radii = [chance.uniform(0.03, 0.2) * size for size in shape]
        mask[sum(((at - c) / r) ** 2 for at, c, r in zip(grid, centre, radii, strict=True)) < 1] = value
    present = np.unique(mask)
    missing = sorted(set(range(1, count + 1)) - set(present.tolist()))
    mask[0, 0, : len(missing)] = missing  # wholly hidden: one pixel each
    return mask


def _by_highdicom(kind: str, count: int, mask: npt.NDArray[np.uint8], source: Source) -> None:
    hd.seg.Segmentation(
        source_images=list(source.datasets),
        pixel_array=mask,
        segmentation_type=kind,
        segment_descriptions=_descriptions(count),
        series_instance_uid=generate_uid(),
        series_number=100,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="bench",
        manufacturer_model_name="bench",
        software_versions="1",
        device_serial_number="1",
        transfer_syntax_uid=_SYNTAXES[kind],
    ).save_as(BytesIO())


def _descriptions(count: int) -> Sequence[hd.seg.SegmentDescription]:
    algorithm = hd.AlgorithmIdentificationSequence("bench", codes.cid7162.ArtificialIntelligence, "1")
    return [
        hd.seg.SegmentDescription(
            n, f"Organ {n}", codes.SCT.Organ, codes.SCT.Lung, "AUTOMATIC", algorithm, generate_uid(), f"organ {n}"
        )
        for n in range(1, count + 1)
    ]
