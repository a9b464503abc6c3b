"""The figures on the model cards, each by one command: python -m workers.measure MODEL [FOLDER]."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.table import Table

from dicom_node import heap, log
from dicom_node.catalogue import default_folder
from dicom_node.demo.phantom import Phantom, dice, make_thorax, write_series
from dicom_node.errors import ModelRefused, SettingsError
from dicom_node.niceness import wait_asleep
from workers.bundle import Bundle, Bundles
from workers.guarding import guarded
from workers.prediction import Detection, Grid, Prediction
from workers.quantities import volumes_by_value
from workers.volume import Volume, load

console = Console()

SIZES = (4.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0)  # mm
_EACH = 8  # nodules of each size
_AT_ONCE = 4  # nodules in a lung at the same time
_SUBSLICES = 5
_NODULE = 30.0  # HU
LUNG_VARIANTS: dict[str, dict[str, object]] = {
    "5 mm slices": {},
    "8 mm slices": {"slices": 35, "spacing": (8.0, 2.0, 1.7)},
    "2 mm slices": {"slices": 140, "spacing": (2.0, 2.0, 1.7)},
    "0.8 mm pixels": {"size": (400, 440), "spacing": (5.0, 0.8, 0.8)},
    "feet first": {"orientation": "reversed"},
    "prone": {"orientation": "prone"},
    "oblique": {"orientation": "oblique"},
    "gantry tilt 18.5 degrees": {"tilt": 18.5},
    "uneven gaps": {"uneven": True},
    "noise of 60 HU": {"noise": 60.0},
    "mass of 40 mm at the chest wall": {"nodules": (((-122.0, 10.0, 20.0), 40.0),)},
}


def measure(
    model: Annotated[str, typer.Argument(help="A model that comes with the node.")],
    folder: Annotated[
        Path | None, typer.Argument(help="A series to measure on; for lungs by default phantoms.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of places and phantoms.")] = 1,
    models: Annotated[Path | None, typer.Option(help="Where the models lie, if elsewhere.")] = None,
) -> None:
    """Measure a model on phantoms of known truth, or on a real series: a chest CT with nodules inserted, a head."""
    log.configure()
    heap.use_large_pages()
    wait_asleep()
    if model not in ("ct_lung", "ct_lung_nodule"):
        if folder is None:
            raise SettingsError(f"{model}: there is no phantom of it; name a folder with a series")
        console.print(_head_table(models or default_folder(), model, folder))
        return
    bundle = Bundles(device="auto").get((models or default_folder()) / model)
    with tempfile.TemporaryDirectory() as room:  # files of phantoms stay as long as their volumes
        if model == "ct_lung":
            console.print(_lung_table(bundle, folder, Path(room)))
        else:
            series = (
                sorted(folder.rglob("*.dcm")) if folder else _written(make_thorax(nodules=(), seed=seed), Path(room))
            )
            console.print(_nodule_table(bundle, load(series), np.random.default_rng(seed)))


def _written(phantom: Phantom, room: Path) -> list[Path]:
    return write_series(phantom, Path(tempfile.mkdtemp(dir=room)))


def _lung_table(bundle: Bundle, folder: Path | None, room: Path) -> Table:
    table = Table("series", "Dice right", "Dice left", "right mL", "left mL", "seconds")
    if folder:
        volume = load(sorted(folder.rglob("*.dcm")))
        table.add_row(folder.name, "", "", *_sizes_and_seconds(bundle, volume)[1])
    for name, variant in LUNG_VARIANTS.items() if folder is None else ():
        phantom = make_thorax(**variant)  # type: ignore[arg-type]
        volume = load(_written(phantom, room))
        labels, texts = _sizes_and_seconds(bundle, volume)
        on_source = _in_order(phantom, volume, labels)
        table.add_row(
            name,
            f"{dice(on_source == 1, phantom.right):.3f}",
            f"{dice(on_source == 2, phantom.left):.3f}",
            *texts,
        )
    return table


def _in_order(phantom: Phantom, volume: Volume, labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return labels in the order of the phantom's slices, which the volume may have turned round."""
    on_source = volume.to_source(labels)
    first = np.array(volume.source.dataset_of(0).ImagePositionPatient, float)
    turned = np.abs(first - phantom.origins[0]).max() > 0.01
    return on_source[::-1] if turned else on_source


def _sizes_and_seconds(bundle: Bundle, volume: Volume) -> tuple[npt.NDArray[np.uint8], tuple[str, str, str]]:
    started = time.perf_counter()
    labels = bundle.model(volume.grid, lambda part: None).labels
    seconds = time.perf_counter() - started
    assert labels is not None  # noqa: S101 - ct_lung always answers with labels
    sizes = volumes_by_value(labels, volume.grid)
    return labels, (f"{sizes.get(1, 0) / 1000:.0f}", f"{sizes.get(2, 0) / 1000:.0f}", f"{seconds:.1f}")


# -- heads --------------------------------------------------------------------------------------------------------

_OTHER = {"mr_brain": "brain_mask", "brain_mask": "mr_brain"}  # networks of different makers for the same thing


def _head_table(models: Path, name: str, folder: Path) -> Table:
    """Return a volume for each segment, the time and memory that it took, and what another model says of it."""
    bundles = Bundles(device="auto")
    bundle = bundles.get(models / name)
    manifest = bundle.manifest
    volume = load(sorted(folder.rglob("*.dcm")), manifest.input)
    started = time.perf_counter()
    prediction = bundle.model(volume.grid, lambda part: None)
    seconds = time.perf_counter() - started
    bundles.close()
    table = Table("segment", "mL", title=f"{seconds:.0f} s, {_most_held():.1f} GB at most")
    labels = guarded(prediction, volume.grid, manifest).labels
    if labels is None:
        raise ModelRefused(f"{name} answers without segments: there is nothing to measure")
    sizes = volumes_by_value(labels, volume.grid)
    for value, output in manifest.outputs.segments.items():
        table.add_row(output.label, f"{sizes.get(value, 0) / 1000:.1f}")
    if name in _OTHER:
        table.add_row(f"Dice with {_OTHER[name]}", _agreement(models / _OTHER[name], volume, labels == 1))
    return table


def _most_held() -> float:
    """Return the most memory (GB) that this process or an ended model's held."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1e6


def _agreement(other: Path, volume: Volume, mask: npt.NDArray[np.bool_]) -> str:
    bundles = Bundles(device="auto")
    try:
        bundle = bundles.get(other)
    except (ModelRefused, SettingsError) as error:  # it is not there, or has no weights
        return str(error)
    if volume.grid.modality not in bundle.manifest.input.modality:
        return f"takes no {volume.grid.modality}"
    labels = bundle.model(volume.grid, lambda part: None).labels
    bundles.close()
    return "" if labels is None else f"{dice(mask, labels == 1):.3f}"


# -- nodules ------------------------------------------------------------------------------------------------------


def _nodule_table(bundle: Bundle, volume: Volume, chance: np.random.Generator) -> Table:
    grid = volume.grid
    lungs = Bundles(device="auto").get(default_folder() / "ct_lung").model(grid, lambda part: None).labels
    assert lungs is not None  # noqa: S101 - ct_lung always answers with labels
    before = bundle.model(grid, lambda part: None)
    table = Table("diameter mm", "inserted", "found", "sensitivity", "other findings a scan", title=_title(before))
    for diameter in SIZES:
        found, inserted, others, scans = 0, 0, 0, 0
        while inserted < _EACH:
            places = list(_places(grid, lungs > 0, diameter, chance))[:_AT_ONCE]
            if not places:
                break
            after = bundle.model(_with_nodules(grid, places, diameter), lambda part: None)
            hits = [_hit(place, diameter, after.detections, grid) for place in places]
            found, inserted, scans = found + sum(hits), inserted + len(places), scans + 1
            others += len(after.detections) - sum(hits)
        share = f"{found / inserted:.2f}" if inserted else ""
        table.add_row(f"{diameter:g}", str(inserted), str(found), share, f"{others / max(1, scans):.1f}")
    return table


def _title(before: Prediction) -> str:
    return f"{len(before.detections)} findings before any nodule was inserted"


Place = tuple[int, int, int]


def _places(grid: Grid, lungs: npt.NDArray[np.bool_], diameter: float, chance: np.random.Generator) -> Iterator[Place]:
    """Yield places in aerated lung, far enough from each other and with room for the nodule."""
    candidates = np.argwhere(lungs & (grid.values < -700))
    taken: list[npt.NDArray[np.float64]] = []
    for voxel in candidates[chance.permutation(len(candidates))[:500]]:
        point = voxel * np.array(grid.spacing)
        if all(np.linalg.norm(point - other) > 2.5 * diameter + 20 for other in taken) and _has_room(
            grid, lungs, voxel, diameter
        ):
            taken.append(point)
            yield int(voxel[0]), int(voxel[1]), int(voxel[2])


def _has_room(grid: Grid, lungs: npt.NDArray[np.bool_], voxel: npt.NDArray[np.int64], diameter: float) -> bool:
    reach = [int(np.ceil(diameter / 2 / size)) for size in grid.spacing]
    box = tuple(slice(max(0, c - r), c + r + 1) for c, r in zip(voxel, reach, strict=True))
    return bool(lungs[box].mean() > 0.9)


def _with_nodules(grid: Grid, places: list[Place], diameter: float) -> Grid:
    """Return the grid with soft-edged balls of tissue, averaged over each slice's thickness as a scanner does."""
    values: npt.NDArray[np.float32] = grid.values.astype(np.float32)
    soft = float(np.mean(grid.spacing[1:]))
    for place in places:
        share = np.zeros(grid.values.shape, np.float32)
        reach = [int(np.ceil((diameter / 2 + 4) / size)) + 1 for size in grid.spacing]
        box = tuple(slice(max(0, c - r), c + r + 1) for c, r in zip(place, reach, strict=True))
        k, j, i = (np.arange(length)[part] for length, part in zip(grid.values.shape, box, strict=True))
        for offset in (np.arange(_SUBSLICES) + 0.5) / _SUBSLICES - 0.5:
            z = grid.positions[k] + offset * grid.thickness[k] - grid.positions[place[0]]
            y, x = (j - place[1]) * grid.spacing[1], (i - place[2]) * grid.spacing[2]
            away = np.sqrt(z[:, None, None] ** 2 + y[None, :, None] ** 2 + x[None, None, :] ** 2)
            share[box] += np.clip((diameter / 2 - away) / soft + 0.5, 0, 1) / _SUBSLICES
        values += share * (_NODULE - values)
    return replace(grid, values=np.asarray(values, np.float32))


def _hit(place: Place, diameter: float, detections: tuple[Detection, ...], grid: Grid) -> bool:
    """Return whether the middle of some detection lies in the nodule, or within 3 mm of its middle."""
    spacing = np.array(grid.spacing)
    return any(
        float(np.linalg.norm((np.array(found.centre) - np.array(place)) * spacing)) < max(diameter / 2, 3.0)
        for found in detections
    )


if __name__ == "__main__":
    typer.run(measure)
