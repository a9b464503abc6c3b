"""The page that a Secondary Capture shows: key slices with overlay and boxes beside a legend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from dicom_node.findings import Finding, Findings
from dicom_node.labelling import Context
from dicom_node.results.contours import contours
from dicom_node.results.drawing import FINDING_COLOUR, caption, numbers, side
from dicom_node.results.rendering import Window, aspect, edges, rendered
from dicom_node.results.typeface import font
from dicom_node.source import Source

_WIDTH, _HEIGHT = 1600, 1200  # pixels; a workstation shows it whole
_BAR = 64
_LEGEND = 480
_MARGIN = 8
_MOST_FRAMES = 6
_OPACITY = 0.28
_WHITE, _PALE, _BLACK, _GROUND = (255, 255, 255), (190, 190, 190), (0, 0, 0), (22, 22, 22)
_WARNING = (255, 176, 0)
_CLOSEUP = 320  # pixels of the page
_CLOSEUP_SHOWS = 5.0  # times the box's longer side
_SUPERSAMPLED = 2  # lines are drawn at twice the size and smoothed

Colour = tuple[int, int, int]


def shown_frames(findings: Findings, source: Source) -> list[int]:
    """Return the frames that the page shows: key frames of the surest findings, else slices through the structures."""
    ranked = sorted(findings.findings, key=lambda finding: -finding.confidence)
    keys = list(dict.fromkeys(finding.box.frame for finding in ranked))[:_MOST_FRAMES]
    if keys:
        return sorted(keys)
    present = [
        frame
        for frame in range(len(source.frames))
        if any((findings.labels[segment.layer][frame] == segment.value).any() for segment in findings.segments)
    ] or list(range(len(source.frames)))
    wanted = min(len(present), _MOST_FRAMES if findings.segments else 3)
    places = np.linspace(0, len(present) - 1, wanted + 2)[1:-1] if len(present) > wanted else np.arange(len(present))
    return [present[round(place)] for place in places]


def page(findings: Findings, source: Source, context: Context) -> npt.NDArray[np.uint8]:
    """Return the page in RGB, shape `(rows, columns, 3)`. No patient's identity is on it."""
    canvas = Image.new("RGB", (_WIDTH, _HEIGHT), _GROUND)
    frames = shown_frames(findings, source)
    columns, rows = _grid(len(frames), aspect_of_images=_proportion(source, frames[0]))
    width = (_WIDTH - _LEGEND - _MARGIN) // columns
    height = (_HEIGHT - 2 * _BAR) // rows
    window = Window(*findings.window) if findings.window else None
    for number, frame in enumerate(frames):
        tile = _tile(frame, findings, source, window, (width - _MARGIN, height - _MARGIN))
        corner = (_MARGIN + number % columns * width, _BAR + number // columns * height)
        canvas.paste(tile, corner)
    _write_bars(canvas, context)
    _write_legend(canvas, findings, lambda finding: _closeup(finding, source, window))
    return np.asarray(canvas)


def _proportion(source: Source, frame: int) -> float:
    """Return how much taller than wide an image is."""
    header = source.header_of(frame)
    return int(header.Rows) * aspect(header) / int(header.Columns)


def _grid(count: int, *, aspect_of_images: float) -> tuple[int, int]:
    """Return columns and rows that show `count` images at their largest."""
    width, height = _WIDTH - _LEGEND - _MARGIN, _HEIGHT - 2 * _BAR

    def size(columns: int) -> float:
        return min(width / columns, height / -(-count // columns) / aspect_of_images)

    columns = max(range(1, count + 1), key=size)
    return columns, -(-count // columns)


# -- one image ----------------------------------------------------------------------------------------------------


def _tile(frame: int, findings: Findings, source: Source, window: Window | None, size: tuple[int, int]) -> Image.Image:
    header = source.header_of(frame)
    image = rendered(source, frame, window).astype(np.float32)
    masks = [(findings.labels[segment.layer][frame] == segment.value, segment.colour) for segment in findings.segments]
    for mask, colour in masks:
        image[mask] = (1 - _OPACITY) * image[mask] + _OPACITY * np.array(colour, np.float32)
    rows, columns = image.shape[:2]
    scale = min(size[0] / columns, size[1] / (rows * aspect(header)))
    scales = (scale * _SUPERSAMPLED, scale * aspect(header) * _SUPERSAMPLED)
    large = Image.fromarray(image.astype(np.uint8)).resize(
        (max(round(columns * scales[0]), 1), max(round(rows * scales[1]), 1)), Image.Resampling.BICUBIC
    )
    pen = ImageDraw.Draw(large)
    for mask, colour in masks:
        for contour in contours(mask):
            pen.line([(x * scales[0], y * scales[1]) for x, y in contour.tolist()], fill=colour, width=3)
    shown = [finding for finding in findings.findings if finding.box.frame == frame]
    for finding in shown:
        box = finding.box
        corners = (box.left * scales[0], box.top * scales[1], box.right * scales[0], box.bottom * scales[1])
        pen.rectangle(_around(corners, 4), outline=FINDING_COLOUR, width=4)
    small = large.resize((large.width // _SUPERSAMPLED, large.height // _SUPERSAMPLED), Image.Resampling.LANCZOS)
    tile = Image.new("RGB", size, _BLACK)
    left, top = (size[0] - small.width) // 2, (size[1] - small.height) // 2
    tile.paste(small, (left, top))
    pen = ImageDraw.Draw(tile)
    for finding in shown:
        spot = (left + finding.box.left * scale, top + finding.box.top * scale * aspect(header))
        _write_name(pen, caption(finding), spot, size)
    _write_edges(pen, edges(header), size)
    _write(pen, (10, size[1] - 30), _number(frame, source), _PALE, 18)
    return tile


def _closeup(finding: Finding, source: Source, window: Window | None) -> Image.Image:
    """Return what the box is about, magnified and without anything drawn on it."""
    box, tall = finding.box, aspect(source.header_of(finding.box.frame))
    image = Image.fromarray(rendered(source, box.frame, window))
    side = max(box.right - box.left, (box.bottom - box.top) * tall, 8.0) * _CLOSEUP_SHOWS
    width, height = min(side, image.width), min(side / tall, image.height)
    left = min(max((box.left + box.right - width) / 2, 0), image.width - width)
    top = min(max((box.top + box.bottom - height) / 2, 0), image.height - height)
    scale = _CLOSEUP / max(width, height * tall)
    size = max(round(width * scale), 1), max(round(height * tall * scale), 1)
    return image.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height)).convert("RGB")


def _around(corners: Sequence[float], gap: float) -> tuple[float, float, float, float]:
    """Return a box drawn around what it bounds, not over its rim."""
    left, top, right, bottom = corners
    return left - gap, top - gap, right + gap, bottom + gap


def _write_name(pen: ImageDraw.ImageDraw, text: str, spot: tuple[float, float], size: tuple[int, int]) -> None:
    width = _length(pen, text, 20)
    left = max(4.0, min(spot[0], size[0] - width - 4))
    _write(pen, (left, max(4.0, spot[1] - 32)), text, FINDING_COLOUR, 20)


def _write_edges(pen: ImageDraw.ImageDraw, letters: Sequence[str], size: tuple[int, int]) -> None:
    left, right, top, bottom = letters
    middle_x, middle_y = size[0] // 2, size[1] // 2
    _write(pen, (10, middle_y - 14), left, _WHITE, 26)
    _write(pen, (size[0] - 12 - _length(pen, right, 26), middle_y - 14), right, _WHITE, 26)
    _write(pen, (middle_x, 6), top, _WHITE, 26)
    _write(pen, (middle_x, size[1] - 38), bottom, _WHITE, 26)


def _number(frame: int, source: Source) -> str:
    place = source.frames[frame]
    header = source.datasets[place.instance]
    if int(header.get("NumberOfFrames") or 1) > 1:
        return f"frame {place.frame_number}"
    return f"image {header.InstanceNumber}" if header.get("InstanceNumber") else f"slice {frame + 1}"


# -- text ---------------------------------------------------------------------------------------------------------


def _write_bars(canvas: Image.Image, context: Context) -> None:
    pen = ImageDraw.Draw(canvas)
    _write(pen, (16, 14), context.series_description(), _WHITE, 32)
    when = f"{context.now:%Y-%m-%d %H:%M}"
    _write(pen, (_WIDTH - 16 - _length(pen, when, 24), 20), when, _PALE, 24)
    _write_disclaimer(pen, context.disclaimer, _WIDTH - 480)
    model = f"{context.model.name} {context.model.version}  {context.model.digest[:12]}"
    _write(pen, (_WIDTH - 16 - _length(pen, model, 18), _HEIGHT - 42), model, _PALE, 18)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of the legend: a coloured square, a title, smaller lines below it."""

    colour: Colour | None
    title: str
    details: Sequence[str] = ()
    finding: Finding | None = None


def _write_disclaimer(pen: ImageDraw.ImageDraw, text: str, width: int) -> None:
    """Write it as large as one line allows; a long one in two."""
    for size in (30, 26, 22, 20, 18, 16):
        lines = _wrapped(pen, text, size, width)
        if len(lines) <= 1 + (size <= 20):
            break
    top = _HEIGHT - _BAR + (14 if len(lines) < 2 else 6)
    for number, line in enumerate(lines):
        _write(pen, (16, top + number * (size + 6)), line, _WARNING, size)


def _write_legend(canvas: Image.Image, findings: Findings, closeup: Callable[[Finding], Image.Image]) -> None:
    """Write entry below entry; findings get a close-up where there is room for those of all."""
    pen = ImageDraw.Draw(canvas)
    left, top, bottom = _WIDTH - _LEGEND + 16, _BAR + 8, _HEIGHT - _BAR
    blocks = [
        (entry, _wrapped(pen, entry.title, 25, _LEGEND - 70), [*_lines(pen, entry.details)])
        for entry in _entries(findings)
    ]
    heights = [34 * len(title) + 28 * len(lines) + 10 for _, title, lines in blocks]
    pictures = sum(heights) + len(findings.findings) * (_CLOSEUP + 10) < bottom - top
    for number, ((entry, title, lines), height) in enumerate(zip(blocks, heights, strict=True)):
        if top + height > bottom - 34 * (number + 1 < len(blocks)):
            _write(pen, (left, top), f"and {len(blocks) - number} more: see the report", _PALE, 22)
            return
        if entry.colour is not None:
            pen.rectangle((left, top + 4, left + 22, top + 26), fill=entry.colour)
        for words, colour, size, step in [(title, _WHITE, 25, 34), (lines, _PALE, 20, 28)]:
            for line in words:
                _write(pen, (left + 36, top), line, colour, size)
                top += step
        top += 10
        if entry.finding is not None and pictures:
            canvas.paste(closeup(entry.finding), (left + 36, top))
            top += _CLOSEUP + 10


def _entries(findings: Findings) -> list[_Entry]:
    """Return the legend: what was found, what was not, what could not be judged, and the structures."""
    entries = []
    for finding in sorted(findings.findings, key=lambda finding: -finding.confidence):
        details = [f"confidence {finding.confidence * 100:.0f} %", numbers(finding), side(finding)]
        entries.append(_Entry(FINDING_COLOUR, finding.label, [detail for detail in details if detail], finding))
    found = {finding.finding for finding in findings.findings}
    entries += [_Entry(None, f"No {code.meaning.lower()} found") for code in findings.looked_for if code not in found]
    entries += [_Entry(_WARNING, "Partial result", [reason]) for reason in findings.incomplete]
    entries += [
        _Entry(None, f"{one.label}: {one.answer.meaning}", [f"probability {one.probability * 100:.0f} %"])
        for one in findings.answers
    ]
    outlined = {finding.segment for finding in findings.findings}
    for number, segment in enumerate(findings.segments):
        if number not in outlined:
            details = [detail for detail in (numbers(segment), side(segment)) if detail]
            entries.append(_Entry(segment.colour, segment.label, details))
    return entries


def _lines(pen: ImageDraw.ImageDraw, details: Sequence[str]) -> Iterator[str]:
    for detail in details:
        yield from _wrapped(pen, detail, 20, _LEGEND - 70)


def _wrapped(pen: ImageDraw.ImageDraw, text: str, size: int, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and _length(pen, f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _length(pen: ImageDraw.ImageDraw, text: str, size: int) -> float:
    return pen.textlength(text, font=font(text, size))


def _write(pen: ImageDraw.ImageDraw, spot: tuple[float, float], text: str, colour: Colour, size: int) -> None:
    """Write with a dark rim, so that it can be read on any image."""
    pen.text(spot, text, fill=colour, font=font(text, size), stroke_width=2, stroke_fill=_BLACK)
