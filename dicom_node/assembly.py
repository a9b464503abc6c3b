"""When a series counts as complete.

DICOM has no end-of-series message, so completeness is a hypothesis that rests on evidence. Strong evidence
(the sender has released its association, and either the announced count is there or the slices leave no gap)
lets a series start after a short settle time. Without it only silence counts. An open association that has
touched the series holds it open, whatever else speaks for an end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from dicom_node.entities import SlicePlace

_SAME_DIRECTION = 1e-3
_GAP_TOLERANCE = 0.25  # share of the median gap by which neighbouring gaps may differ


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known about whether more of a series will come; times are seconds on one clock."""

    received: int
    announced: int | None
    whole: bool  # every instance is complete by itself: projections, multi-frame objects
    places: Sequence[SlicePlace]
    held_open: bool
    released: bool
    last_activity: float


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a series is complete, why, and otherwise when to ask again."""

    complete: bool
    reason: str
    ask_again: float = 0.0


def decide(evidence: Evidence, *, now: float, settle: float, quiet: float) -> Decision:
    """Return whether the series is complete at `now`; `settle` and `quiet` are seconds."""
    if evidence.held_open:
        return Decision(False, "an association that sent some of it is open", now)
    fact = strong_evidence(evidence) if evidence.released else None
    wait = settle if fact else quiet
    due = evidence.last_activity + wait
    if now < due:
        return Decision(False, f"waiting {wait:g} s after the last activity", due)
    ending = "association released" if evidence.released else "association ended without release"
    if fact:
        return Decision(True, f"{fact}, {ending}")
    return Decision(True, f"{evidence.received} received, {ending}, quiet for {quiet:g} s")


def strong_evidence(evidence: Evidence) -> str | None:
    """Return the fact that says nothing is missing, or None.

    An announced count that is not reached speaks against completeness, however smooth the slices lie.
    One that is exceeded was about something else (an acquisition of several) and says nothing.
    """
    received, announced = evidence.received, evidence.announced
    if announced is not None and received <= announced:
        return f"{received} of {announced} announced" if received == announced else None
    if evidence.whole:
        return f"{received} received, each complete by itself"
    if len(evidence.places) == received and leaves_no_gap(evidence.places):
        return f"{received} slices without a gap"
    return None


def leaves_no_gap(places: Sequence[SlicePlace]) -> bool:
    """Return whether at least three parallel slices follow each other at even distances along their normal.

    Several images at one position (phases, echoes) are fine as long as every position has equally many.
    """
    if len(places) < 3:
        return False
    orientations = np.array([place.image_orientation_patient for place in places])
    if np.abs(orientations - orientations[0]).max() > _SAME_DIRECTION:
        return False
    normal = np.cross(orientations[0, :3], orientations[0, 3:])
    along = np.array([place.image_position_patient for place in places]) @ normal
    positions, counts = np.unique(np.round(along, 2), return_counts=True)
    if len(positions) < 3 or counts.min() != counts.max():
        return False
    gaps = np.diff(positions)
    typical = median(gaps)
    return bool(np.abs(gaps - typical).max() <= _GAP_TOLERANCE * typical)
