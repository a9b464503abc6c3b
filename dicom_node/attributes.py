"""One header as an operator's route sees it: DICOM keyword to values as text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydicom import Dataset, dcmread
from pydicom.datadict import keyword_for_tag
from pydicom.multival import MultiValue

from dicom_node.errors import InputRefused, Unavailable
from dicom_node.routing import CALLING_AE_TITLE

_NOT_TEXT = frozenset({"SQ", "OB", "OW", "OD", "OF", "OL", "OV", "UN"})


def attributes_of(dataset: Dataset, calling_ae_title: str = "") -> dict[str, tuple[str, ...]]:
    """Return every top-level element that has a keyword and is text or a number; empty values are left out."""
    attributes = {keyword: values for keyword, values in _elements(dataset) if values}
    if calling_ae_title:
        attributes[CALLING_AE_TITLE] = (calling_ae_title,)
    return attributes


def _elements(dataset: Dataset) -> Iterator[tuple[str, tuple[str, ...]]]:
    for tag in sorted(dataset.keys()):  # the keys alone: going over the dataset would parse every value
        keyword = keyword_for_tag(tag)
        if not keyword:
            continue
        try:
            element = dataset[tag]
        except Exception:  # noqa: S112 - a malformed element matches nothing
            continue
        if element.VR not in _NOT_TEXT:
            yield keyword, _texts(element.value)


def _texts(value: object) -> tuple[str, ...]:
    values = value if isinstance(value, (MultiValue, list, tuple)) else [value]
    texts = (str(item).strip() for item in values if item is not None)
    return tuple(text for text in texts if text)


def read_attributes(path: Path, calling_ae_title: str = "") -> dict[str, tuple[str, ...]]:
    """Read the header of a Part 10 file; raise InputRefused where it is none, Unavailable where the disk is away."""
    try:
        dataset = dcmread(path, stop_before_pixels=True)
        return attributes_of(dataset, calling_ae_title)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputRefused(f"{path}: {error.strerror}") from error
    except OSError as error:
        raise Unavailable(f"{path}: {error.strerror}") from error
    except Exception as error:
        # pydicom answers a broken file with whatever exception comes first
        raise InputRefused(f"{path}: not a readable DICOM file ({type(error).__name__})") from error
