"""Which slices of a series belong together: a stack of one acquisition, never some of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dicom_node.errors import NotApplicable
from dicom_node.findings import Reason
from workers.slices import TRAITS, Slice

_SAME_POSITION = 0.01  # mm
_STRAY = (10.0, 30.0)  # a gap of ten typical ones, and of as many mm, ends a stack
_EVEN = 0.1  # of the typical gap: how much gaps of an evenly spaced stack differ
_COVERED = 0.3  # of all places: how many an acquisition has on average
_FEW = 3  # slices; fewer are no acquisition of their own


@dataclass(frozen=True, slots=True)
class Stack:
    """Slices in order along their normal, one at each place; `left_out` says what of the series is not among them."""

    slices: tuple[Slice, ...]
    left_out: tuple[str, ...]


def best_stack(slices: Sequence[Slice], suits: Callable[[Slice], bool] = lambda piece: True) -> Stack:
    """Return the stack to look at: of those that suit the one with the most slices, then the one acquired first.

    Raises:
        NotApplicable: no slice has a place.
    """
    if not slices:
        raise NotApplicable(Reason.GEOMETRY_UNUSABLE, "no image has a position and an orientation in the patient")
    stacks = [stack for block in _parallel(slices) for stack in _acquisitions(block)]
    suitable = [stack for stack in stacks if suits(stack[0])] or stacks
    chosen = min(suitable, key=lambda stack: (-len(stack), min(piece.rank for piece in stack)))
    kept = _one_a_position(chosen)
    gathered = _without_strays(kept)
    of_another = sum(not piece.stacks_with(chosen[0]) for piece in slices)
    counts = {
        "images of another orientation, size or object": of_another,
        f"images of another acquisition{_how(stacks, chosen)}": len(slices) - of_another - len(chosen),
        "images at a position that another one has": len(chosen) - len(kept),
        "images far from all others": len(kept) - len(gathered),
    }
    return Stack(tuple(gathered), tuple(f"{number} {what} left out" for what, number in counts.items() if number))


def _parallel(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Return sets of slices of one orientation, size and frame of reference."""
    blocks: list[list[Slice]] = []
    for piece in slices:
        block = next((block for block in blocks if block[0].stacks_with(piece)), None)
        if block is None:
            blocks.append([piece])
        else:
            block.append(piece)
    return blocks


def _acquisitions(block: list[Slice]) -> list[list[Slice]]:
    """Return the block by its acquisitions: phases, echoes, b-values, reconstructions.

    A trait tells them apart where it makes places unique, or where each of its groups is evenly spaced and all of
    them together are not. Slices of one place that nothing tells apart stay together.
    """
    if not (_share_places(block) or _is_uneven(block)):
        return [block]
    for number, _ in enumerate(TRAITS):
        groups: dict[str, list[Slice]] = {}
        for piece in block:
            groups.setdefault(piece.traits[number], []).append(piece)
        if len(groups) > 1 and _tells_apart(list(groups.values()), block):
            return [stack for group in groups.values() for stack in _acquisitions(group)]
    return [block]


def _tells_apart(groups: Sequence[list[Slice]], block: Sequence[Slice]) -> bool:
    if _share_places(block):
        # not where it only numbers the images: then each group has few of the places
        places = len(_one_a_position(block))
        return sum(len(_one_a_position(group)) for group in groups) >= _COVERED * places * len(groups)
    return all(len(group) > _FEW and not _is_uneven(group) for group in groups) and _interlock(groups)


def _interlock(groups: Sequence[list[Slice]]) -> bool:
    """Return whether groups lie among one another, as two scans of one region do, and not one after the other."""
    normal = groups[0][0].normal
    ranges = [(min(along), max(along)) for along in ([float(p.position @ normal) for p in group] for group in groups)]
    shared = min(high for _, high in ranges) - max(low for low, _ in ranges)
    return shared > 0.5 * min(high - low for low, high in ranges)


def _along(stack: Sequence[Slice]) -> npt.NDArray[np.float64]:
    normal = stack[0].normal
    return np.sort(np.array([float(piece.position @ normal) for piece in stack]))


def _share_places(stack: Sequence[Slice]) -> bool:
    return bool((np.diff(_along(stack)) <= _SAME_POSITION).any())


def _is_uneven(stack: Sequence[Slice]) -> bool:
    gaps = np.diff(_along(stack))
    return len(gaps) > 1 and float(np.ptp(gaps)) > _EVEN * float(np.median(gaps))


def _how(stacks: Sequence[Sequence[Slice]], chosen: Sequence[Slice]) -> str:
    """Return by what the others differ from the chosen stack: ` (EchoTime)`."""
    differ = {
        name
        for number, (name, _) in enumerate(TRAITS)
        for stack in stacks
        if stack is not chosen and stack[0].stacks_with(chosen[0])
        if stack[0].traits[number] != chosen[0].traits[number]
    }
    named = [name for name, _ in TRAITS if name in differ and name != "AcquisitionTime"]
    return f" ({', '.join(named[:3])})" if named else ""


def _one_a_position(stack: Sequence[Slice]) -> list[Slice]:
    """Return slices in order, of those at one position the first by acquisition."""
    normal = stack[0].normal
    groups: list[list[Slice]] = []
    for piece in sorted(stack, key=lambda piece: float(piece.position @ normal)):
        if groups and float((piece.position - groups[-1][0].position) @ normal) <= _SAME_POSITION:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return [min(group, key=lambda piece: (piece.rank, piece.frame_number)) for group in groups]


def _without_strays(stack: list[Slice]) -> list[Slice]:
    """Return the longest run of slices without a gap that no scan has: a tracker image far away is no part of it."""
    gaps = np.diff([float(piece.position @ stack[0].normal) for piece in stack])
    if not len(gaps):
        return stack
    times, least = _STRAY
    ends = np.flatnonzero(gaps > max(times * float(np.median(gaps)), least)) + 1
    return max((list(run) for run in np.split(np.array(stack, object), ends)), key=len)
