"""Is a coded concept one that DICOM lists, with the meaning that DICOM gives it?"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, cast

from pydicom.sr._concepts_dict import concepts

from dicom_node.manifest import CodeEntry

_LISTED: Mapping[str, Mapping[str, Mapping[str, tuple[str, object]]]] = cast(Any, concepts)
"""Scheme -> keyword -> value -> (meaning, context groups): the content of PS3.16."""


def fault(entry: CodeEntry) -> str:
    """Return what is wrong with a code, and what would be right; "" where nothing is, or nobody here can tell.

    pydicom has the codes of SCT, DCM and UCUM that PS3.16 lists; those of FMA and RADLEX are taken on trust.
    """
    if entry.scheme not in _LISTED:
        return ""
    meanings = [values[entry.value][0] for values in _LISTED[entry.scheme].values() if entry.value in values]
    if entry.meaning in meanings:
        return ""
    if meanings:
        return f"{entry.value} means {meanings[0]!r}, not {entry.meaning!r}"
    known = {
        values_meaning: value
        for values in _LISTED[entry.scheme].values()
        for value, (values_meaning, _) in values.items()
    }
    near = difflib.get_close_matches(entry.meaning, list(known), n=1)
    hint = f' ("{near[0]}" is {known[near[0]]})' if near else ""
    return f"{entry.scheme} {entry.value} is not in DICOM's lists{hint}"
