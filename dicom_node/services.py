"""The standard's tables: SOP classes, transfer syntaxes and statuses that the node accepts, proposes and answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from hmac import compare_digest
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from pydicom.uid import AllTransferSyntaxes, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

VERIFICATION = "1.2.840.10008.1.1"


_MODALITIES = """
AR AS ASMT AU BDUS BI BMD CD CF CFM CP CR CS CT CTPROTOCOL DD DF DG DM DMS DOC DS DX EC ECG EEG EMG EOG EPS ES FA FID
FS GM HC HD IO IOL IVOCT IVUS KER KO LEN LP LS M3D MA MG MR MS NM OAM OCT OP OPM OPR OPT OPTBSV OPTENF OPV OSS OT PA
PLAN POS PR PT PX REG RESP RF RG RTDOSE RTIMAGE RTINTENT RTPLAN RTRAD RTRECORD RTSEGANN RTSTRUCT RWV SEG SM SMR SR SRF
ST STAIN TEXTUREMAP TG US VA VF XA XAPROTOCOL XC
"""
MODALITIES = frozenset(_MODALITIES.split())
"""The defined terms of Modality, the retired ones among them (PS3.3 C.7.3.1.1.1)."""


def modality_term(value: str) -> str:
    """Return a Modality where it is one of the standard's; "" where a sender has put something else there."""
    return value if value in MODALITIES else ""


class Use(StrEnum):
    """What the node does with instances of a SOP class."""

    IMAGE = "image"  # one image of a series: completeness is a question of count and position
    WHOLE = "whole"  # complete by itself: projection, multi-frame
    KEPT = "kept"  # stored so that no sender is refused; never an input


@dataclass(frozen=True, slots=True)
class SopClass:
    """One Storage SOP Class that the SCP accepts (PS3.4 Table B.5-1)."""

    uid: str
    name: str
    use: Use


_S = "1.2.840.10008.5.1.4.1.1."
STORAGE_SOP_CLASSES: tuple[SopClass, ...] = (
    SopClass(_S + "2", "CT Image", Use.IMAGE),
    SopClass(_S + "2.1", "Enhanced CT Image", Use.WHOLE),
    SopClass(_S + "2.2", "Legacy Converted Enhanced CT Image", Use.WHOLE),
    SopClass(_S + "4", "MR Image", Use.IMAGE),
    SopClass(_S + "4.1", "Enhanced MR Image", Use.WHOLE),
    SopClass(_S + "4.3", "Enhanced MR Color Image", Use.WHOLE),
    SopClass(_S + "4.4", "Legacy Converted Enhanced MR Image", Use.WHOLE),
    SopClass(_S + "128", "Positron Emission Tomography Image", Use.IMAGE),
    SopClass(_S + "130", "Enhanced PET Image", Use.WHOLE),
    SopClass(_S + "128.1", "Legacy Converted Enhanced PET Image", Use.WHOLE),
    SopClass(_S + "20", "Nuclear Medicine Image", Use.WHOLE),
    SopClass(_S + "1", "Computed Radiography Image", Use.WHOLE),
    SopClass(_S + "1.1", "Digital X-Ray Image - For Presentation", Use.WHOLE),
    SopClass(_S + "1.1.1", "Digital X-Ray Image - For Processing", Use.WHOLE),
    SopClass(_S + "1.2", "Digital Mammography X-Ray Image - For Presentation", Use.WHOLE),
    SopClass(_S + "1.2.1", "Digital Mammography X-Ray Image - For Processing", Use.WHOLE),
    SopClass(_S + "1.3", "Digital Intra-Oral X-Ray Image - For Presentation", Use.WHOLE),
    SopClass(_S + "1.3.1", "Digital Intra-Oral X-Ray Image - For Processing", Use.WHOLE),
    SopClass(_S + "13.1.3", "Breast Tomosynthesis Image", Use.WHOLE),
    SopClass(_S + "13.1.4", "Breast Projection X-Ray Image - For Presentation", Use.WHOLE),
    SopClass(_S + "13.1.5", "Breast Projection X-Ray Image - For Processing", Use.WHOLE),
    SopClass(_S + "6.1", "Ultrasound Image", Use.WHOLE),
    SopClass(_S + "3.1", "Ultrasound Multi-frame Image", Use.WHOLE),
    SopClass(_S + "6.2", "Enhanced US Volume", Use.WHOLE),
    SopClass(_S + "6", "Ultrasound Image (retired)", Use.WHOLE),
    SopClass(_S + "3", "Ultrasound Multi-frame Image (retired)", Use.WHOLE),
    SopClass(_S + "12.1", "X-Ray Angiographic Image", Use.WHOLE),
    SopClass(_S + "12.1.1", "Enhanced XA Image", Use.WHOLE),
    SopClass(_S + "12.2", "X-Ray Radiofluoroscopic Image", Use.WHOLE),
    SopClass(_S + "12.2.1", "Enhanced XRF Image", Use.WHOLE),
    SopClass(_S + "13.1.1", "X-Ray 3D Angiographic Image", Use.WHOLE),
    SopClass(_S + "13.1.2", "X-Ray 3D Craniofacial Image", Use.WHOLE),
    SopClass(_S + "7", "Secondary Capture Image", Use.WHOLE),
    SopClass(_S + "7.1", "Multi-frame Single Bit Secondary Capture Image", Use.WHOLE),
    SopClass(_S + "7.2", "Multi-frame Grayscale Byte Secondary Capture Image", Use.WHOLE),
    SopClass(_S + "7.3", "Multi-frame Grayscale Word Secondary Capture Image", Use.WHOLE),
    SopClass(_S + "7.4", "Multi-frame True Color Secondary Capture Image", Use.WHOLE),
    SopClass(_S + "77.1.5.1", "Ophthalmic Photography 8 Bit Image", Use.WHOLE),
    SopClass(_S + "77.1.5.4", "Ophthalmic Tomography Image", Use.WHOLE),
    SopClass(_S + "66.4", "Segmentation", Use.KEPT),
    SopClass(_S + "66.7", "Label Map Segmentation", Use.KEPT),
    SopClass(_S + "30", "Parametric Map", Use.KEPT),
    SopClass(_S + "88.11", "Basic Text SR", Use.KEPT),
    SopClass(_S + "88.22", "Enhanced SR", Use.KEPT),
    SopClass(_S + "88.33", "Comprehensive SR", Use.KEPT),
    SopClass(_S + "88.34", "Comprehensive 3D SR", Use.KEPT),
    SopClass(_S + "88.50", "Mammography CAD SR", Use.KEPT),
    SopClass(_S + "88.65", "Chest CAD SR", Use.KEPT),
    SopClass(_S + "88.67", "X-Ray Radiation Dose SR", Use.KEPT),
    SopClass(_S + "88.59", "Key Object Selection Document", Use.KEPT),
    SopClass(_S + "11.1", "Grayscale Softcopy Presentation State", Use.KEPT),
    SopClass(_S + "11.2", "Color Softcopy Presentation State", Use.KEPT),
    SopClass(_S + "104.1", "Encapsulated PDF", Use.KEPT),
    SopClass(_S + "66", "Raw Data", Use.KEPT),
    SopClass(_S + "481.3", "RT Structure Set", Use.KEPT),
    SopClass(_S + "88.69", "Colon CAD SR", Use.KEPT),
    SopClass(_S + "88.40", "Procedure Log", Use.KEPT),
    SopClass(_S + "11.3", "Pseudo-Color Softcopy Presentation State", Use.KEPT),
    SopClass(_S + "11.4", "Blending Softcopy Presentation State", Use.KEPT),
    SopClass(_S + "67", "Real World Value Mapping", Use.KEPT),
    SopClass(_S + "66.1", "Spatial Registration", Use.KEPT),
    SopClass(_S + "66.2", "Spatial Fiducials", Use.KEPT),
    SopClass(_S + "4.2", "MR Spectroscopy", Use.KEPT),
    SopClass(_S + "9.1.1", "12-lead ECG Waveform", Use.KEPT),
    SopClass(_S + "9.1.2", "General ECG Waveform", Use.KEPT),
    SopClass(_S + "9.1.3", "Ambulatory ECG Waveform", Use.KEPT),
    SopClass(_S + "9.2.1", "Hemodynamic Waveform", Use.KEPT),
    SopClass(_S + "9.3.1", "Cardiac Electrophysiology Waveform", Use.KEPT),
    SopClass(_S + "9.4.1", "Basic Voice Audio Waveform", Use.KEPT),
    SopClass(_S + "481.1", "RT Image", Use.KEPT),
    SopClass(_S + "481.2", "RT Dose", Use.KEPT),
    SopClass(_S + "481.4", "RT Beams Treatment Record", Use.KEPT),
    SopClass(_S + "481.5", "RT Plan", Use.KEPT),
    SopClass(_S + "481.6", "RT Brachy Treatment Record", Use.KEPT),
    SopClass(_S + "481.7", "RT Treatment Summary Record", Use.KEPT),
    SopClass(_S + "77.1.1", "VL Endoscopic Image", Use.KEPT),
    SopClass(_S + "77.1.2", "VL Microscopic Image", Use.KEPT),
    SopClass(_S + "77.1.3", "VL Slide-Coordinates Microscopic Image", Use.KEPT),
    SopClass(_S + "77.1.4", "VL Photographic Image", Use.KEPT),
    SopClass(_S + "77.1.5.2", "Ophthalmic Photography 16 Bit Image", Use.KEPT),
    SopClass(_S + "77.1.5.3", "Stereometric Relationship", Use.KEPT),
)

STORAGE_BY_UID = {sop_class.uid: sop_class for sop_class in STORAGE_SOP_CLASSES}


def use_of(sop_class_uid: str) -> Use:
    """Return what the node does with instances of a SOP Class; one that is in no row, a private one, is kept."""
    known = STORAGE_BY_UID.get(sop_class_uid)
    return known.use if known else Use.KEPT


TRANSFER_SYNTAXES: tuple[str, ...] = tuple(str(uid) for uid in AllTransferSyntaxes)
"""Accepted for every Storage SOP Class; the bytes are kept in the one that the sender put first."""

RESULT_TRANSFER_SYNTAXES: tuple[str, ...] = (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian))
"""Proposed for every result object, in this order."""

SEGMENTATION = _S + "66.4"
LABEL_MAP_SEGMENTATION = _S + "66.7"


@dataclass(frozen=True, slots=True)
class ResultKind:
    """One word of a peer's `results`: which objects it stands for, and what shows them."""

    name: str
    sop_class_uids: tuple[str, ...]
    what: str
    instead: tuple[str, ...] = ()  # what says the same to a peer that does not take this, the best first


RESULT_KINDS: tuple[ResultKind, ...] = (
    # in the order of encoding: a kind after those that it refers to
    ResultKind(
        "seg", (SEGMENTATION, LABEL_MAP_SEGMENTATION), "masks: OHIF, 3D Slicer, MITK, Weasis", ("gsps", "sr", "sc")
    ),
    ResultKind(
        "sr", (_S + "88.34",), "findings, boxes, measurements: OHIF, 3D Slicer; as text in most PACS", ("gsps", "sc")
    ),
    ResultKind(
        "gsps",
        (_S + "11.1", _S + "11.2"),
        "outlines, boxes and labels on the images: Weasis, OsiriX, most PACS",
        ("sc",),
    ),
    ResultKind("sc", (_S + "7",), "one picture with key slices and legend: everything that shows an image", ("gsps",)),
    ResultKind("kos", (_S + "88.59",), "a list of the key images", ("gsps", "sc", "sr")),
    ResultKind("pm", (_S + "30",), "probability for each voxel, of models that give one: OHIF, 3D Slicer", ("seg",)),
    ResultKind("rtstruct", (_S + "481.3",), "outlines for radiotherapy planning", ("seg",)),
)
RESULT_KIND_NAMES = tuple(kind.name for kind in RESULT_KINDS)

RESULT_SOP_CLASSES: dict[str, str] = {
    uid: STORAGE_BY_UID[uid].name for kind in RESULT_KINDS for uid in kind.sop_class_uids
}
"""What the node sends."""


def transfer_syntaxes(sop_class_uid: str) -> tuple[str, ...]:
    """Return the transfer syntaxes proposed for a result object: a label map's own is run-length encoding."""
    own = (str(RLELossless),) if sop_class_uid == LABEL_MAP_SEGMENTATION else ()
    return (*own, *RESULT_TRANSFER_SYNTAXES)


class Status(IntEnum):
    """DIMSE statuses that the node answers (PS3.4 B.2.3, PS3.7 C)."""

    SUCCESS = 0x0000
    PROCESSING_FAILURE = 0x0110
    NO_SUCH_SOP_INSTANCE = 0x0112
    INVALID_ARGUMENT_VALUE = 0x0115
    NO_SUCH_ACTION = 0x0123
    NOT_AUTHORISED = 0x0124
    RESOURCE_LIMITATION = 0x0213
    OUT_OF_RESOURCES = 0xA700
    DATA_SET_DOES_NOT_MATCH_SOP_CLASS = 0xA900
    CANNOT_UNDERSTAND = 0xC000


@dataclass(frozen=True, slots=True)
class Answer:
    """What is answered to a request: a status, and why (PS3.7 Annex C)."""

    status: int
    comment: str = ""  # at most 64 characters
    offending_element: int | None = None


SUCCESS = Answer(Status.SUCCESS)

STORE_ANSWERS: dict[Status, str] = {
    Status.SUCCESS: "on stable storage, and in the ledger a moment later; also for the same bytes again, and for other "
    "bytes under a UID that is taken (set aside, event for the operator)",
    Status.OUT_OF_RESOURCES: "disk below its watermark, storage away, or the ledger for long: nothing is kept, send "
    "again later",
    Status.DATA_SET_DOES_NOT_MATCH_SOP_CLASS: "the data set contradicts its command, or a UID is missing or malformed",
    Status.CANNOT_UNDERSTAND: "the data set cannot be parsed or is cut off",
    Status.PROCESSING_FAILURE: "an unexpected error, or the association is being closed",
}
"""When which status is answered to a C-STORE."""


class Verdict(StrEnum):
    """What a status that a peer answers to our C-STORE means for the job."""

    STORED = "stored"
    AGAIN = "again"
    NEVER = "never"


VERDICTS: tuple[tuple[int, int, Verdict], ...] = (
    (0x0000, 0x0000, Verdict.STORED),
    (0xB000, 0xBFFF, Verdict.STORED),  # warnings all of them (PS3.7 C.3), whatever the peer means by its own
    (0x0001, 0x0001, Verdict.STORED),
    (0x0107, 0x0107, Verdict.STORED),
    (0x0116, 0x0116, Verdict.STORED),
    (0x0111, 0x0111, Verdict.STORED),  # duplicate SOP instance: it has it
    (0x0110, 0x0110, Verdict.AGAIN),  # processing failure
    (0x0210, 0x0213, Verdict.AGAIN),  # duplicate invocation .. resource limitation
    (0xA700, 0xA7FF, Verdict.AGAIN),  # out of resources
)


def verdict(status: int) -> Verdict:
    """Return what the C-STORE response `status` means; a status in no row of the table is NEVER."""
    for first, last, meaning in VERDICTS:
        if first <= status <= last:
            return meaning
    return Verdict.NEVER


class Rejection(StrEnum):
    """Why an association is rejected; the value is the event's name for it."""

    CALLING_AE_TITLE = "calling AE title not recognised"
    CALLED_AE_TITLE = "called AE title not recognised"
    ADDRESS = "address not admitted"
    CERTIFICATE = "not the certificate of this calling AE title"
    USER = "not the user of this calling AE title"
    LOCAL_LIMIT = "local limit of associations reached"
    PEER_LIMIT = "limit of associations for this peer reached"
    STOPPING = "the node is stopping"


A_ASSOCIATE_RJ: dict[Rejection, tuple[int, int, int]] = {
    # (result, source, reason) of PS3.8 Table 9-21; limits are transient, so that senders try again
    Rejection.CALLING_AE_TITLE: (1, 1, 3),
    Rejection.CALLED_AE_TITLE: (1, 1, 7),
    Rejection.ADDRESS: (1, 1, 1),
    Rejection.CERTIFICATE: (1, 1, 3),
    Rejection.USER: (1, 1, 3),
    Rejection.LOCAL_LIMIT: (2, 3, 2),
    Rejection.PEER_LIMIT: (2, 3, 2),
    Rejection.STOPPING: (2, 3, 1),
}


@dataclass(frozen=True, slots=True)
class Credentials:
    """What proves that who calls with an AE title may bear it; empty: nothing has to."""

    certificates: frozenset[str] = frozenset()  # SHA-256, hex
    user: str = ""
    passcode: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks for an association, and what it shows."""

    called_ae_title: str
    calling_ae_title: str
    address: str
    certificate_sha256: str | None = None
    user: str = ""
    passcode: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Admission:
    """Who may associate, and how many at once; an empty list of calling AE titles or networks admits everyone."""

    ae_title: str
    check_called_ae_title: bool
    calling_ae_titles: frozenset[str]
    maximum_associations: int
    maximum_associations_per_peer: int
    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    credentials: Mapping[str, Credentials] = field(default_factory=dict)  # by calling AE title

    def judge(self, caller: Caller, *, open_in_all: int, open_of_peer: int) -> Rejection | None:
        """Return why to reject an association, or None; the counts are those of the others already open."""
        if self.networks and not any(_address(caller.address) in network for network in self.networks):
            return Rejection.ADDRESS
        if self.check_called_ae_title and caller.called_ae_title.strip() != self.ae_title:
            return Rejection.CALLED_AE_TITLE
        if self.calling_ae_titles and caller.calling_ae_title.strip() not in self.calling_ae_titles:
            return Rejection.CALLING_AE_TITLE
        wanted = self.credentials.get(caller.calling_ae_title.strip(), Credentials())
        if wanted.certificates and caller.certificate_sha256 not in wanted.certificates:
            return Rejection.CERTIFICATE
        if wanted.user and not (
            caller.user == wanted.user and compare_digest(caller.passcode.encode(), wanted.passcode.encode())
        ):
            return Rejection.USER
        if open_in_all >= self.maximum_associations:
            return Rejection.LOCAL_LIMIT
        if open_of_peer >= self.maximum_associations_per_peer:
            return Rejection.PEER_LIMIT
        return None

    def is_user_wanted(self, caller: Caller) -> bool:
        """Return whether whoever calls with this AE title must name a user."""
        return bool(self.credentials.get(caller.calling_ae_title.strip(), Credentials()).user)


def _address(text: str) -> IPv4Address | IPv6Address:
    """Return an address; one of IPv4 that came in through a socket of IPv6 is one of IPv4."""
    address = ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address
