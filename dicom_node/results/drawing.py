"""What is said about a finding or a structure wherever it is drawn: its name, its numbers."""

from __future__ import annotations

import math

from dicom_node.findings import Finding, Measurement, Segment

FINDING_COLOUR = (255, 210, 0)  # sRGB
_UNITS = {"cm3": "ml", "[hnsf'U]": "HU", "1": ""}  # as a person writes what UCUM writes otherwise


def caption(tracked: Finding | Segment) -> str:
    """Return a short name for an image: `AI: Nodule 1 (87 %)`."""
    sure = f" ({tracked.confidence * 100:.0f} %)" if isinstance(tracked, Finding) else ""
    return f"AI: {tracked.label}{sure}"


def numbers(tracked: Finding | Segment) -> str:
    """Return the measurements in words: `volume 1.31 ml, diameter 14.2 mm`."""
    return ", ".join(number(measurement) for measurement in tracked.measurements)


def number(measurement: Measurement) -> str:
    """Return one measurement in words."""
    unit = _UNITS.get(measurement.unit.value, measurement.unit.value)
    return f"{measurement.name.meaning.lower()} {written(measurement.value)} {unit}".rstrip()


def written(value: float) -> str:
    """Return a number as a person writes it: three digits that count, all those before the point, no exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(2 - math.floor(math.log10(abs(value))), 0)
    text = f"{value:.{min(decimals, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def side(tracked: Finding | Segment) -> str:
    """Return where it is: `left lung`; "" where nothing is said, or the name says it."""
    place = tracked.site.meaning if tracked.site else ""
    words = " ".join(word for word in (tracked.laterality.meaning if tracked.laterality else "", place) if word).lower()
    return "" if words in tracked.label.lower() else words
