"""Standardised uptake values from the headers of PET images (QIBA's vendor-neutral pseudo-code for SUVbw)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

from pydicom import Dataset

from dicom_node.errors import NotApplicable
from dicom_node.findings import Reason

_PHILIPS = (0x7053, "Philips PET Private Group")
_PHILIPS_SUV, _PHILIPS_ACTIVITY = 0x00, 0x09  # from rescaled counts to SUVbw, and to Bq/ml
_GE, _GE_SCAN = (0x0009, "GEMS_PETD_01"), 0x0D  # when the scan began, kept by series that were processed later

_DAY = timedelta(days=1)
_SCAN_BEFORE_INJECTION = timedelta(minutes=30)  # dynamic series begin before the tracer is given
_HALF_LIVES = 10.0  # after so many nothing is left to see: the dates are not those of one examination
_LEAST_DOSE = 1e5  # Bq; a smaller number was written in MBq
_GREATEST_WEIGHT = 700.0  # kg; a greater number was written in g
_CORRECTIONS = ("ATTN", "DECY")  # without them values are no activity concentrations
_DATE_TIME = re.compile(r"(\d{8})(\d{2,6})(?:\.\d*)?([+-]\d{4})?")


def suv_factor(header: Dataset, first: datetime | None = None) -> float:
    """Return what rescaled values of a PET image are multiplied by to become SUVbw, in g/ml.

    `first` is when the earliest image of the series was acquired (see `first_acquisition`); without it this
    image is taken for the earliest.

    Raises:
        NotApplicable: the units are others, or an element that the calculation needs is missing or makes no sense.
    """
    units = str(header.get("Units") or "").upper()
    if units not in _BY_UNITS:
        raise _missing("Units", f"are {_term(units)}; SUV is known from BQML, GML and Philips' CNTS")
    corrected = _texts(header.get("CorrectedImage"))
    lacking = [correction for correction in _CORRECTIONS if corrected and correction not in corrected]
    if lacking:
        raise _missing("CorrectedImage", f"does not say {' or '.join(lacking)}")
    return _BY_UNITS[units](header, first)


def first_acquisition(headers: Iterable[Dataset]) -> datetime | None:
    """Return when the earliest image of a series was acquired; None where no image says."""
    return min((moment for moment in map(_acquired, headers) if moment is not None), default=None)


def _from_becquerel(header: Dataset, first: datetime | None) -> float:
    weight = _positive(header, "PatientWeight")  # kg
    if weight > _GREATEST_WEIGHT:
        raise _missing("PatientWeight", f"of {weight:g} kg makes no sense")
    injected = _radiopharmaceutical(header)
    dose = _positive(injected, "RadionuclideTotalDose")  # Bq at its start
    if dose < _LEAST_DOSE:
        raise _missing("RadionuclideTotalDose", f"of {dose:g} Bq makes no sense")
    correction = str(header.get("DecayCorrection") or "").upper()
    if correction == "ADMIN":
        decayed = dose
    elif correction == "START":
        decayed = dose * math.pow(2.0, -_half_lives(header, injected, first))
    else:
        raise _missing("DecayCorrection", f"is {_term(correction)}; START and ADMIN are known")
    return weight * 1000.0 / decayed


def _from_philips(header: Dataset, first: datetime | None) -> float:
    factor = _number(_private(header, _PHILIPS, _PHILIPS_SUV))
    if factor > 0:
        return factor
    activity = _number(_private(header, _PHILIPS, _PHILIPS_ACTIVITY))
    if activity > 0:
        return activity * _from_becquerel(header, first)
    raise _missing("Units", "are CNTS, and Philips' scale factors (7053,1000) and (7053,1009) are not there")


def _from_grams(header: Dataset, first: datetime | None) -> float:
    """Return 1: values are SUVbw already, unless they are SUV by another measure of the body (PS3.3 C.8.9.1)."""
    kind = str(header.get("SUVType") or "BW").upper()
    if kind != "BW":
        raise _missing("SUVType", f"is {_term(kind)}; models are made for BW")
    return 1.0


_TERMS = frozenset(
    # of Units, Decay Correction and SUV Type (PS3.3 C.8.9.1)
    [
        *("CNTS", "NONE", "CM2", "CM2ML", "PCNT", "CPS", "BQML", "MGMINML", "UMOLMINML", "MLMING", "MLG", "1CM"),
        *("UMOLML", "PROPCNT", "PROPCPS", "MLMINML", "MLML", "GML", "STDDEV", "START", "ADMIN"),
        *("BSA", "LBM", "LBMJAMES128", "LBMJANMA", "IBW", "BW"),
    ]
)

_BY_UNITS: Mapping[str, Callable[[Dataset, datetime | None], float]] = {
    "BQML": _from_becquerel,
    "CNTS": _from_philips,
    "GML": _from_grams,
}


def _radiopharmaceutical(header: Dataset) -> Dataset:
    sequence = header.get("RadiopharmaceuticalInformationSequence")
    if not sequence:
        raise _missing("RadiopharmaceuticalInformationSequence")
    if len(sequence) > 1:
        raise _missing("RadiopharmaceuticalInformationSequence", f"names {len(sequence)} tracers")
    item: Dataset = sequence[0]
    return item


# -- how long the tracer had decayed ------------------------------------------------------------------------------


def _half_lives(header: Dataset, injected: Dataset, first: datetime | None) -> float:
    """Return the time from injection to the moment that the images are corrected to, in half-lives."""
    half_life = _positive(injected, "RadionuclideHalfLife")  # s
    start = _scan_start(header, first, half_life)
    given = _given(header, injected, start)
    if given > start + _SCAN_BEFORE_INJECTION:
        raise _missing("RadiopharmaceuticalStartDateTime", "is later than the scan")
    passed = (start - given).total_seconds() / half_life
    if passed > _HALF_LIVES:
        raise _missing("RadiopharmaceuticalStartDateTime", f"is {passed:.0f} half-lives before the scan")
    return passed


def _scan_start(header: Dataset, first: datetime | None, half_life: float) -> datetime:
    """Return when the scan began: Series Time, unless the series was made after its images were acquired.

    Then it is GE's own element; or, as it is for Siemens, what Frame Reference Time counts from; or the first image.
    """
    series = _moment(header, "SeriesDate", "SeriesTime")
    acquired = _acquired(header)
    earliest = min((moment for moment in (first, acquired) if moment is not None), default=None)
    if earliest is None:
        if series is None:
            raise _missing("SeriesTime")
        return series
    if series is not None and series <= earliest:
        return series
    of_ge = _date_time(_private(header, _GE, _GE_SCAN), header)
    return of_ge or _counted_back(header, acquired, half_life) or earliest


def _counted_back(header: Dataset, acquired: datetime | None, half_life: float) -> datetime | None:
    """Return what Frame Reference Time counts from: it is the time of the average count rate within the frame."""
    reference = _stated(header, "FrameReferenceTime") / 1000.0  # s
    duration = _stated(header, "ActualFrameDuration") / 1000.0  # s
    if acquired is None or reference <= 0 or duration <= 0:
        return None
    decay = math.log(2.0) / half_life
    average = math.log(decay * duration / -math.expm1(-decay * duration)) / decay
    return acquired + timedelta(seconds=average - reference)


def _given(header: Dataset, injected: Dataset, start: datetime) -> datetime:
    """Return when the tracer was injected; a time without a date is the last one before the scan."""
    dated = _date_time(injected.get("RadiopharmaceuticalStartDateTime"), header)
    if dated is not None:
        return dated
    given = _clock(injected.get("RadiopharmaceuticalStartTime"), start)
    if given is None:
        raise _missing("RadiopharmaceuticalStartTime")
    return given if given <= start + _SCAN_BEFORE_INJECTION else given - _DAY


def _acquired(header: Dataset) -> datetime | None:
    return _moment(header, "AcquisitionDate", "AcquisitionTime") or _date_time(
        header.get("AcquisitionDateTime"), header
    )


# -- values of elements -------------------------------------------------------------------------------------------


def _moment(header: Dataset, date: str, time: str) -> datetime | None:
    day = _parsed(str(header.get(date) or ""), "%Y%m%d")
    return _clock(header.get(time), day) if day is not None else None


def _clock(value: Any, day: datetime) -> datetime | None:
    text = str(value or "").partition(".")[0].replace(":", "")
    clock = _parsed(text.ljust(6, "0"), "%H%M%S") if text else None
    return datetime.combine(day.date(), clock.time()) if clock is not None else None


def _date_time(value: Any, header: Dataset) -> datetime | None:
    """Return a DT in the zone of the header's other times; an offset counts where the header states its own."""
    match = _DATE_TIME.fullmatch(str(value or "").strip())
    if match is None:
        return None
    moment = _parsed(match[1] + match[2].ljust(6, "0"), "%Y%m%d%H%M%S")
    zone = str(header.get("TimezoneOffsetFromUTC") or "")
    if moment is None or not match[3] or not re.fullmatch(r"[+-]\d{4}", zone):
        return moment
    return moment - _offset(match[3]) + _offset(zone)


def _offset(text: str) -> timedelta:
    sign = -1 if text[0] == "-" else 1
    return sign * timedelta(hours=int(text[1:3]), minutes=int(text[3:5]))


def _parsed(text: str, form: str) -> datetime | None:
    try:
        return datetime.strptime(text, form)
    except ValueError:
        return None


def _private(header: Dataset, block: tuple[int, str], element: int) -> Any:
    try:
        return header.private_block(*block)[element].value
    except KeyError:
        return None


def _texts(value: Any) -> tuple[str, ...]:
    """Return the values of a text element of one value or several."""
    return tuple(str(value).upper().split("\\")) if isinstance(value, str) else tuple(map(str, value or ()))


def _positive(header: Dataset, keyword: str) -> float:
    value = _stated(header, keyword)
    if value <= 0:
        raise _missing(keyword)
    return value


def _stated(header: Dataset, keyword: str) -> float:
    try:
        return _number(header.get(keyword))
    except Exception:
        return 0.0  # what is no number: pydicom converts on access, with exceptions of several kinds


def _number(value: Any) -> float:
    try:
        number = float(value) if value not in (None, "") else 0.0
    except (TypeError, ValueError):
        return 0.0
    return number if math.isfinite(number) else 0.0


def _term(value: object) -> str:
    """Return a value where it is one of the standard's: what is not may say who the patient is."""
    text = str(value or "")
    return text if text in _TERMS else "something else" if text else "not stated"


def _missing(keyword: str, why: str = "is missing, or makes no sense") -> NotApplicable:
    return NotApplicable(Reason.NO_SUV, f"no SUV: {keyword} {why}")
