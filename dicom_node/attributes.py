"""One header as an operator's route sees it: DICOM keyword to values as text."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from pydicom import Dataset
from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.multival import MultiValue

from dicom_node import rations
from dicom_node.errors import InputRefused, Unavailable
from dicom_node.routing import CALLING_AE_TITLE

_NOT_TEXT = frozenset({"SQ", "OB", "OW", "OD", "OF", "OL", "OV", "UN"})
_PATIENT = 0x0010  # the group of the Patient module
_OF_A_VISIT = frozenset({"AccessionNumber", "StudyID", "AdmissionID", "RequestedProcedureID", "ServiceEpisodeID"})
_LONGEST = 1 << 16  # bytes of a value that a route may ask about
_ITEMS = 100_000  # of sequences, which are passed over: the node reads this itself, and has other things to do


def attributes_of(
    dataset: Dataset, calling_ae_title: str = "", asked: Collection[str] | None = None
) -> dict[str, tuple[str, ...]]:
    """Return every top-level element that has a keyword and is text or a number; empty values are left out.

    Where only some keywords are `asked` for, only those.
    """
    attributes = {keyword: values for keyword, values in _elements(dataset, asked) if values}
    if calling_ae_title:
        attributes[CALLING_AE_TITLE] = (calling_ae_title,)
    return attributes


def _elements(dataset: Dataset, asked: Collection[str] | None) -> Iterator[tuple[str, tuple[str, ...]]]:
    for tag in sorted(dataset.keys()):  # the keys alone: going over the dataset would parse every value
        keyword = keyword_for_tag(tag)
        if not keyword or (asked is not None and keyword not in asked):
            continue
        try:
            raw = dataset.get_item(tag, keep_deferred=True)
            if isinstance(raw, RawDataElement) and (raw.length > _LONGEST or _vr(raw) in _NOT_TEXT):
                continue  # to look at a sequence is to make objects of all that is in it
            element = dataset[tag]
        except Exception:  # noqa: S112 - a malformed element matches nothing
            continue
        if element.VR not in _NOT_TEXT:
            yield keyword, _texts(element.value)


def _vr(raw: RawDataElement) -> str:
    return raw.VR or dictionary_VR(raw.tag)


def _texts(value: object) -> tuple[str, ...]:
    values = value if isinstance(value, (MultiValue, list, tuple)) else [value]
    texts = (str(item).strip() for item in values if item is not None)
    return tuple(text for text in texts if text)


def read_attributes(
    path: Path, calling_ae_title: str = "", asked: Collection[str] | None = None
) -> dict[str, tuple[str, ...]]:
    """Read `attributes_of` a Part 10 file; raise InputRefused where it is none, Unavailable where the disk is away."""
    try:
        dataset = rations.read(path, items=_ITEMS, stop_before_pixels=True, defer_size=_LONGEST)
        return attributes_of(dataset, calling_ae_title, asked)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputRefused(f"{path}: {error.strerror}") from error
    except OSError as error:
        raise Unavailable(f"{path}: {error.strerror}") from error
    except InputRefused as error:
        raise InputRefused(f"{path}: {error}") from error
    except Exception as error:
        # pydicom answers a broken file with whatever exception comes first
        raise InputRefused(f"{path}: not a readable DICOM file ({type(error).__name__})") from error


def says_who(keyword: str) -> bool:
    """Return whether an element says who a patient is: the Patient module, names of persons, numbers of a visit."""
    tag = tag_for_keyword(keyword)
    if tag is None:
        return False
    return tag >> 16 == _PATIENT or keyword in _OF_A_VISIT or dictionary_VR(tag) == "PN"
