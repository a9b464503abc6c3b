"""Key slices with the overlay and the boxes of the results, drawn from the result files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from pydicom import Dataset, dcmread
from pydicom.pixels.processing import apply_rescale

from dicom_node.demo.reading import Group, Report, frame_segments, functional_group

_TILE = 512  # pixels, width of one slice in the picture
_WINDOW = (-1350.0, 150.0)  # HU; the lung window, centre -600, width 1500
_OPACITY = 0.35
_BOX = (255, 210, 0)
_CAPTION = 26
_LEGEND = 24
_ORGAN_SLICES = 3
_MOST_FINDINGS = 6

Rgb = tuple[int, int, int]


def draw(reports: Sequence[Report], segs: Sequence[Path], files: Sequence[Path], picture: Path) -> None:
    """Write a PNG: a few slices through the organs, and the key slice of each finding with its box."""
    images = {str(dcmread(path, stop_before_pixels=True).SOPInstanceUID): path for path in files}
    overlays = [_Overlay(dcmread(path)) for path in segs]
    tiles = [_tile(images[uid], overlays, [], caption) for uid, caption in _organ_slices(overlays) if uid in images]
    for report in reports:
        for uid, groups in _by_image(report.findings[:_MOST_FINDINGS]).items():
            if uid in images:
                caption = ", ".join(f"{group.label} {group.site}".strip() for group in groups)
                tiles.append(_tile(images[uid], overlays, groups, caption))
    _assembled(tiles, _legend(reports, overlays)).save(picture)


class _Overlay:
    """One SEG: its masks by source image, its segments' names and colours."""

    def __init__(self, segmentation: Dataset) -> None:
        frames = segmentation.pixel_array.reshape(-1, segmentation.Rows, segmentation.Columns)
        self.masks: dict[str, list[tuple[int, npt.NDArray[np.uint8]]]] = {}
        numbers = frame_segments(segmentation)
        for item, number, mask in zip(segmentation.PerFrameFunctionalGroupsSequence, numbers, frames, strict=True):
            derivation = functional_group(segmentation, item, "DerivationImageSequence")
            source = derivation.SourceImageSequence[0].ReferencedSOPInstanceUID
            self.masks.setdefault(str(source), []).append((int(number), mask))
        self.names = {int(item.SegmentNumber): str(item.SegmentLabel) for item in segmentation.SegmentSequence}
        self.colours = {
            int(item.SegmentNumber): _rgb(item.RecommendedDisplayCIELabValue) for item in segmentation.SegmentSequence
        }

    def slices(self) -> list[str]:
        """Return the images that carry some of every segment, or any of them, in the order of the frames."""
        full = [uid for uid, masks in self.masks.items() if len(masks) == len(self.names)]
        return full or list(self.masks)


def _organ_slices(overlays: Sequence[_Overlay]) -> list[tuple[str, str]]:
    """Return image and caption of slices spread over the SEG with the most frames."""
    if not overlays:
        return []
    largest = max(overlays, key=lambda overlay: len(overlay.masks))
    slices = largest.slices()
    places = np.linspace(0, len(slices) - 1, _ORGAN_SLICES + 2).astype(int)[1:-1]
    return [(slices[place], ", ".join(largest.names.values())) for place in places]


def _by_image(groups: Sequence[Group]) -> Mapping[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in groups:
        if group.outline is not None:
            found.setdefault(group.outline.sop_instance_uid, []).append(group)
    return found


def _tile(path: Path, overlays: Sequence[_Overlay], boxes: Sequence[Group], caption: str) -> Image.Image:
    dataset = dcmread(path)
    hu = apply_rescale(dataset.pixel_array, dataset).astype(np.float32)
    low, high = _WINDOW
    grey = np.clip((hu - low) / (high - low) * 255, 0, 255)
    canvas = np.repeat(grey[..., None], 3, axis=2)
    for overlay in overlays:
        for number, mask in overlay.masks.get(str(dataset.SOPInstanceUID), ()):
            colour = np.array(overlay.colours[number], np.float32)
            canvas[mask > 0] = (1 - _OPACITY) * canvas[mask > 0] + _OPACITY * colour
    row_spacing, column_spacing = (float(value) for value in dataset.get("PixelSpacing", (1, 1)))
    scale_x = _TILE / canvas.shape[1]
    scale_y = scale_x * row_spacing / column_spacing
    size = (_TILE, round(canvas.shape[0] * scale_y))
    tile = Image.fromarray(canvas.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(tile)
    for group in boxes:
        left, top, right, bottom = group.outline.box if group.outline else (0.0,) * 4
        corners = (left * scale_x - 2, top * scale_y - 2, right * scale_x + 2, bottom * scale_y + 2)
        pen.rectangle(corners, outline=_BOX, width=2)
    pen.text((6, 4), f"slice {dataset.get('InstanceNumber', '?')}: {caption}", fill=(255, 255, 255), font=_font(16))
    return tile


def _assembled(tiles: Sequence[Image.Image], legend: Sequence[tuple[Rgb, str]]) -> Image.Image:
    columns = min(3, max(1, len(tiles)))
    rows = -(-len(tiles) // columns)
    height = max((tile.height for tile in tiles), default=0)
    picture = Image.new("RGB", (columns * _TILE, rows * height + len(legend) * _LEGEND + _CAPTION), (16, 16, 16))
    for number, tile in enumerate(tiles):
        picture.paste(tile, ((number % columns) * _TILE, (number // columns) * height))
    pen = ImageDraw.Draw(picture)
    for number, (colour, text) in enumerate(legend):
        top = rows * height + _CAPTION // 2 + number * _LEGEND
        pen.rectangle((10, top + 2, 26, top + 18), fill=colour)
        pen.text((36, top), text, fill=(235, 235, 235), font=_font(16))
    return picture


def _legend(reports: Sequence[Report], overlays: Sequence[_Overlay]) -> list[tuple[Rgb, str]]:
    organs = [
        (overlay.colours[number], name)
        for overlay in overlays
        for number, name in list(overlay.names.items())[:_MOST_FINDINGS]
    ]
    return [*organs, *((_BOX, report.description) for report in reports if report.findings)]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _rgb(cielab: Sequence[int]) -> Rgb:
    """Return the sRGB colour of a Recommended Display CIELab Value (PS3.3 C.10.7.1.1)."""
    lightness = cielab[0] / 65535 * 100
    a, b = (value / 65535 * 255 - 128 for value in cielab[1:])
    y = (lightness + 16) / 116
    xyz = np.array([_inverse(a / 500 + y) * 0.9642, _inverse(y), _inverse(y - b / 200) * 0.8249])
    linear = _XYZ_TO_SRGB @ xyz
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.clip(linear, 0, None) ** (1 / 2.4) - 0.055)
    red, green, blue = np.clip(np.round(srgb * 255), 0, 255).astype(int)
    return int(red), int(green), int(blue)


_XYZ_TO_SRGB = np.array(  # D50 to sRGB, Bradford-adapted
    [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
)


def _inverse(value: float) -> float:
    return value**3 if value > 6 / 29 else 3 * (6 / 29) ** 2 * (value - 4 / 29)
