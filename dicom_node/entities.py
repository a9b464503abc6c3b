"""What has been received, and from whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

Orientation = tuple[float, float, float, float, float, float]
Position = tuple[float, float, float]


class SlicePlace(NamedTuple):
    """Where one image lies: Image Orientation and Image Position (Patient), mm (PS3.3 C.7.6.2)."""

    image_orientation_patient: Orientation
    image_position_patient: Position


class Header(NamedTuple):
    """What the node reads of an instance while it arrives; no pixel data, no patient identity."""

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    modality: str
    number_of_frames: int
    announced: int | None  # how many instances the headers say the series has
    place: SlicePlace | None
    is_own_result: bool


class Instance(NamedTuple):
    """One SOP Instance on disk; `path` is relative to the spool, `digest` is that of the dataset as received."""

    header: Header
    transfer_syntax_uid: str
    path: str
    digest: str  # hex
    size: int  # bytes of the file


@dataclass(frozen=True, slots=True)
class AssociationIdentity:
    """One incoming association, as far as the ledger is concerned."""

    association_id: str
    calling_ae_title: str
    called_ae_title: str
    address: str
