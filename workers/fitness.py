"""Is a series what a model was made for? The first reason why not, coded and in words."""

from __future__ import annotations

from collections.abc import Iterator

from dicom_node.errors import NotApplicable
from dicom_node.findings import Reason
from dicom_node.manifest import InputSlot
from dicom_node.selection import objections
from workers.volume import Volume


def check_input(volume: Volume, slot: InputSlot) -> None:
    """Raise NotApplicable with the first reason why the series is not what the model was made for."""
    for reason, detail in _objections(volume, slot):
        raise NotApplicable(reason, detail)


def _objections(volume: Volume, slot: InputSlot) -> Iterator[tuple[Reason, str]]:
    header = volume.header
    yield from objections(header, slot)
    grid = volume.grid
    if grid.placed and slot.orientation not in ("any", volume.plane):
        yield Reason.WRONG_ORIENTATION, f"{volume.plane}, made for {slot.orientation}"
    frames = len(volume.source.frames)
    if frames not in slot.frames:
        yield Reason.TOO_FEW_SLICES, f"{frames} slices, made for {slot.frames.min:g} to {slot.frames.max:g}"
    if grid.placed and grid.spacing[grid.stack] not in slot.slice_spacing:
        yield Reason.SPACING_OUT_OF_RANGE, f"slices {grid.spacing[grid.stack]:.2f} mm apart"
    in_plane = [value for axis, value in enumerate(grid.spacing) if axis != grid.stack]
    if any(value not in slot.in_plane_spacing for value in in_plane):
        yield Reason.SPACING_OUT_OF_RANGE, f"pixels {max(in_plane):.2f} mm apart"
    thickness = float(header.get("SliceThickness") or grid.spacing[grid.stack])
    if grid.placed and thickness not in slot.slice_thickness:
        yield Reason.SPACING_OUT_OF_RANGE, f"slices {thickness:.2f} mm thick"
