"""A model on its own example, as on a routed series: python -m workers.examining FOLDER."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Annotated

import typer

from dicom_node import heap, log
from dicom_node.catalogue import read_model
from dicom_node.demo.phantom import make_thorax, write_series
from dicom_node.errors import NodeError
from dicom_node.findings import Finding, Findings, Segment
from dicom_node.forms import Form
from dicom_node.labelling import Context, ModelIdentity, digest_of_input
from dicom_node.manifest import Example, Manifest, Range
from dicom_node.niceness import wait_asleep
from dicom_node.results import encode_all
from dicom_node.results.drawing import number
from dicom_node.selfcheck import require_sound
from workers.bundle import Bundle, Bundles
from workers.findings_of import findings_of
from workers.fitness import check_input
from workers.guarding import guarded
from workers.volume import Volume, load


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that was looked at: what was expected, what was found, and whether that is right."""

    what: str
    expected: str
    found: str
    right: bool


def examine(
    folder: Annotated[Path, typer.Argument(help="The model's folder.")],
    series: Annotated[Path | None, typer.Option(help="A folder of DICOM files instead of the model's example.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Run a model on its example; print a JSON line for each thing that was looked at. Exit 1 where one is wrong."""
    log.configure()
    heap.use_large_pages()
    wait_asleep()
    right = True
    for line in _lines(folder, series, device):
        right &= line.right
        typer.echo(json.dumps(asdict(line)))
        sys.stdout.flush()
    raise typer.Exit(0 if right else 1)


def _lines(folder: Path, series: Path | None, device: str) -> Iterator[Line]:
    try:
        found = read_model(folder)
        started = time.monotonic()
        bundles = Bundles(device=device)
        bundle = bundles.get(folder)
        yield Line(
            "weights", "the files that the manifest names", f"loaded in {time.monotonic() - started:.1f} s", True
        )
        example = found.manifest.example or Example()
        if series is None and example.folder is None and example.phantom is None:
            yield Line("example", "", "none: write [example] with a folder or a phantom", True)
            return
        with tempfile.TemporaryDirectory() as scratch:
            paths = _paths(folder, example, series, Path(scratch))
            volume = load(paths, found.manifest.input)
            check_input(volume, found.manifest.input)
            yield from _run(bundle, volume, example if series is None else Example())
    except NodeError as error:
        yield Line("model", "", str(error), False)


def _paths(folder: Path, example: Example, series: Path | None, scratch: Path) -> list[Path]:
    place = series or (folder / example.folder if example.folder else None)
    if place is None:
        return write_series(make_thorax(seed=1), scratch)
    return sorted(path for path in place.rglob("*") if path.is_file())


def _run(bundle: Bundle, volume: Volume, example: Example) -> Iterator[Line]:
    context = _context(bundle, volume)
    started = time.monotonic()
    prediction = bundle.model(volume.grid, lambda part: None)
    seconds = time.monotonic() - started
    peak = _peak(getattr(bundle.model, "pid", None) or os.getpid())
    yield Line("run", "", f"{seconds:.1f} s, {peak:.0f} MiB at most", True)
    findings = findings_of(guarded(prediction, volume.grid, bundle.manifest), volume, bundle.manifest, context)
    yield from compared(findings, example, bundle.manifest)
    kinds = [kind for kind in _KINDS if kind in bundle.manifest.results]
    results = encode_all(kinds, findings, volume.source, context, (Form(),))
    contents = []
    for result in results:
        buffer = BytesIO()
        result.dataset.save_as(buffer, enforce_file_format=True)
        contents.append(buffer.getvalue())
    require_sound(contents, volume.source)
    written = ", ".join(dict.fromkeys(result.kind for result in results))
    yield Line("results", "sound", written or "none", bool(written))


_KINDS = ("seg", "sr", "gsps", "sc", "pm")


def compared(findings: Findings, example: Example, manifest: Manifest) -> Iterator[Line]:
    """Yield what the model said and what the example expects, line by line."""
    labels = {segment.label for segment in findings.segments}
    for label in example.segments:
        yield Line(label, "there", "there" if label in labels else "not there", label in labels)
    tracked: list[Segment | Finding] = [*findings.segments, *findings.findings]
    measured = {
        f"{one.label}: {measurement.name.meaning}": measurement for one in tracked for measurement in one.measurements
    }
    for key, allowed in example.measurements.items():
        measurement = measured.get(key)
        text = number(measurement) if measurement else f"not measured (there is: {', '.join(measured) or 'nothing'})"
        yield Line(key, _words(allowed), text, measurement is not None and measurement.value in allowed)
    for name, allowed in example.findings.items():
        code = manifest.outputs.detections[name].finding.code() if name in manifest.outputs.detections else None
        count = sum(finding.finding == code for finding in findings.findings)
        yield Line(name, _words(allowed), str(count), code is not None and count in allowed)
    for name, wanted in example.answers.items():
        output = manifest.outputs.classifications.get(name)
        given = next(
            (one.answer.meaning for one in findings.answers if output and one.label == output.label), "nothing"
        )
        expected = output.classes[wanted].meaning if output and wanted in output.classes else f"class {wanted}"
        yield Line(name, expected, given, given == expected)
    if not (example.segments or example.measurements or example.findings or example.answers):
        for key, measurement in measured.items():
            yield Line(key, "", number(measurement), True)
        for finding in findings.findings:
            yield Line(finding.label, "", f"{finding.confidence:.0%}", True)


def _words(allowed: Range) -> str:
    return f"{allowed.min:g} to {allowed.max:g}"


def _peak(process: int) -> float:
    """Return the most memory that a process has held, MiB."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) / 1024
    return 0.0


def _context(bundle: Bundle, volume: Volume) -> Context:
    manifest = bundle.manifest
    return Context(
        model=ModelIdentity(manifest.name, manifest.version, manifest.title, manifest.manufacturer, bundle.digest),
        input_digest=digest_of_input((str(header.SOPInstanceUID), "") for header in volume.source.datasets),
        now=datetime.now(UTC),
    )


if __name__ == "__main__":
    typer.run(examine)
