"""From the files of a series to its voxels: the node, a straight pydicom loop, and reading the bytes alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import imagecodecs
import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import UID, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from bench import cases
from bench.measure import OURS, Figure, alternate, figure, processor_seconds, seconds
from workers.volume import load

_QUICK = (40, 256)
_DEAR = {JPEG2000Lossless: "JPEG 2000", JPEGLSLossless: "JPEG-LS", JPEGLosslessSV1: "lossless JPEG"}
_PYDICOM, _READING = "pydicom loop", "reading the bytes"


def figures(*, rounds: int, quick: bool) -> list[Figure]:
    """Return the processor time of loading 300 slices of 512 x 512, uncompressed and run-length encoded."""
    files = cases.chest_ct(*_QUICK) if quick else cases.chest_ct()
    with tempfile.TemporaryDirectory() as folder:
        some = files[: len(files) // 4]
        packed = {syntax: _compressed(some, Path(folder), syntax) for syntax in (RLELossless, *_DEAR)}
        run_lengths = packed[RLELossless]
        return [
            _measured(f"load: {len(files)} slices, uncompressed", files, rounds, {_PYDICOM: 1.0}),
            _measured(f"load: {len(some)} slices, RLE", run_lengths, rounds, {_PYDICOM: 1.0}),
            *(_in_parallel(f"load: {len(some)} slices, {name}", packed[each], rounds) for each, name in _DEAR.items()),
        ]


def _in_parallel(name: str, files: Sequence[Path], rounds: int) -> Figure:
    """Return the time by the clock: what several processors are for."""
    cases = {OURS: lambda: seconds(lambda: load(files)), _PYDICOM: lambda: seconds(lambda: _by_pydicom(files))}
    note = f"by the clock, on {len(os.sched_getaffinity(0))} processors"
    return figure(alternate(cases, rounds), name, "s", bars={_PYDICOM: 1.0}, note=note)


def _measured(name: str, files: Sequence[Path], rounds: int, bars: Mapping[str, float]) -> Figure:
    measured = alternate(
        {
            OURS: lambda: processor_seconds(lambda: load(files)),
            _PYDICOM: lambda: processor_seconds(lambda: _by_pydicom(files)),
            _READING: lambda: processor_seconds(lambda: [path.read_bytes() for path in files]),
        },
        rounds,
    )
    note = "processor time; reading is into fresh memory that is let go at once, the others keep a volume"
    return figure(measured, name, "s", bars=bars, note=note)


def _by_pydicom(files: Sequence[Path]) -> npt.NDArray[np.float32]:
    """Return what a short script makes of a CT series: sorted, rescaled, stacked."""
    images = sorted((dcmread(path) for path in files), key=lambda each: float(each.ImagePositionPatient[2]))
    scaled = [each.pixel_array * np.float32(each.RescaleSlope) + np.float32(each.RescaleIntercept) for each in images]
    return np.stack(scaled)


def _compressed(files: Sequence[Path], folder: Path, syntax: UID) -> list[Path]:
    made = []
    for path in files:
        image = dcmread(path)
        if syntax == JPEGLosslessSV1:
            _as_lossless_jpeg(image)
        else:
            image.compress(syntax, generate_instance_uid=False)
        made.append(folder / f"{syntax}-{path.name}")
        image.save_as(made[-1])
    return made


def _as_lossless_jpeg(image: Dataset) -> None:
    """Compress an image of 16 bits allocated, which pydicom has no encoder for."""
    words = np.frombuffer(image.PixelData, "<u2").reshape(image.Rows, image.Columns)
    frame = imagecodecs.jpeg8_encode(words, lossless=True, predictor=1, bitspersample=16)
    image.PixelData = encapsulate([bytes(frame)])
    image["PixelData"].VR, image["PixelData"].is_undefined_length = "OB", True
    image.file_meta.TransferSyntaxUID = JPEGLosslessSV1
