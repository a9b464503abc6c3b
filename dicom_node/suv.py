"""Standardised uptake values from the headers of PET images (QIBA's vendor-neutral pseudo-code for SUVbw, 2012)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from pydicom import Dataset

from dicom_node.errors import NotApplicable
from dicom_node.findings import Reason

_PHILIPS_SUV = (0x7053, 0x1000)  # documented in Philips' conformance statements: SUV scale factor of CNTS images
_DAY = timedelta(days=1)


def suv_factor(header: Dataset) -> float:
    """Return what rescaled values of a PET image are multiplied by to become SUVbw, in g/ml.

    Raises:
        NotApplicable: the units are others, or an element that the calculation needs is missing or makes no sense.
    """
    units = str(header.get("Units") or "").upper()
    if units not in _BY_UNITS:
        raise _missing("Units", f"are {units or 'not stated'}; SUV is known from BQML, GML and Philips' CNTS")
    return _BY_UNITS[units](header)


def _from_becquerel(header: Dataset) -> float:
    weight = _positive(header, "PatientWeight")  # kg
    injected = _radiopharmaceutical(header)
    dose = _positive(injected, "RadionuclideTotalDose")  # Bq at its start
    half_life = _positive(injected, "RadionuclideHalfLife")  # s
    correction = str(header.get("DecayCorrection") or "").upper()
    if correction == "ADMIN":
        decayed = dose
    elif correction == "START":
        elapsed = _seconds_since_injection(header, injected)
        decayed = dose * math.pow(2.0, -elapsed / half_life)
    else:
        raise _missing("DecayCorrection", f"is {correction or 'not stated'}; START and ADMIN are known")
    return weight * 1000.0 / decayed


def _from_philips(header: Dataset) -> float:
    element = header.get(_PHILIPS_SUV)
    factor = _number(element.value if element is not None else None)
    if not factor:
        raise _missing("Units", "are CNTS, and Philips' SUV scale factor (7053,1000) is not there")
    return factor


_BY_UNITS: Mapping[str, Callable[[Dataset], float]] = {
    "BQML": _from_becquerel,
    "CNTS": _from_philips,
    "GML": lambda header: 1.0,  # is SUVbw already
}


def _radiopharmaceutical(header: Dataset) -> Dataset:
    sequence = header.get("RadiopharmaceuticalInformationSequence")
    if not sequence:
        raise _missing("RadiopharmaceuticalInformationSequence")
    item: Dataset = sequence[0]
    return item


def _seconds_since_injection(header: Dataset, injected: Dataset) -> float:
    """Return the time from injection to the moment that the images are corrected to: the start of the scan.

    That is Series Time, unless the series was made after its images were acquired; then it is the first acquisition.
    """
    scan = _moment(header, "SeriesDate", "SeriesTime")
    acquisition = _moment(header, "AcquisitionDate", "AcquisitionTime")
    start = acquisition if scan is None or (acquisition is not None and scan > acquisition) else scan
    if start is None:
        raise _missing("SeriesTime")
    administered = _date_time(injected.get("RadiopharmaceuticalStartDateTime"))
    if administered is None:
        time = _time(injected.get("RadiopharmaceuticalStartTime"))
        if time is None:
            raise _missing("RadiopharmaceuticalStartTime")
        administered = datetime.combine(start.date(), time.time())
        if administered > start:  # before midnight
            administered -= _DAY
    elapsed = (start - administered).total_seconds()
    if elapsed < 0:
        raise _missing("RadiopharmaceuticalStartDateTime", "is later than the scan")
    return elapsed


def _moment(header: Dataset, date: str, time: str) -> datetime | None:
    day, clock = str(header.get(date) or ""), _time(header.get(time))
    if len(day) != 8 or clock is None:
        return None
    return datetime.combine(datetime.strptime(day, "%Y%m%d").date(), clock.time())


def _time(value: Any) -> datetime | None:
    text = str(value or "").partition(".")[0].replace(":", "")
    return datetime.strptime(text.ljust(6, "0"), "%H%M%S") if text else None


def _date_time(value: Any) -> datetime | None:
    text = str(value or "").partition("+")[0].partition(".")[0]
    return datetime.strptime(text[:14].ljust(14, "0"), "%Y%m%d%H%M%S") if len(text) >= 8 else None


def _positive(header: Dataset, keyword: str) -> float:
    value = _number(header.get(keyword))
    if not value or value <= 0:
        raise _missing(keyword)
    return value


def _number(value: Any) -> float:
    try:
        return float(value) if value not in (None, "") else 0.0
    except (TypeError, ValueError):
        return 0.0


def _missing(keyword: str, why: str = "is missing, or makes no sense") -> NotApplicable:
    return NotApplicable(Reason.NO_SUV, f"no SUV: {keyword} {why}")
