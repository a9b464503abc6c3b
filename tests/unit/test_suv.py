"""SUVbw by hand, for each way that headers say it; and the element that is missing, by name."""

from __future__ import annotations

import pytest
from pydicom import Dataset

from dicom_node.errors import NotApplicable
from dicom_node.suv import suv_factor


def header(**changes) -> Dataset:
    injected = Dataset()
    injected.RadionuclideTotalDose = "370000000"  # 370 MBq
    injected.RadionuclideHalfLife = "6586.2"  # fluorine-18
    injected.RadiopharmaceuticalStartTime = "100000"
    made = Dataset()
    made.Modality, made.Units, made.DecayCorrection, made.PatientWeight = "PT", "BQML", "START", "74"
    made.SeriesDate, made.SeriesTime = "20260102", "110000"
    made.AcquisitionDate, made.AcquisitionTime = "20260102", "110030"
    made.RadiopharmaceuticalInformationSequence = [injected]
    for keyword, value in changes.items():
        target = (
            injected if keyword in ("RadionuclideTotalDose", "RadionuclideHalfLife") or "Start" in keyword else made
        )
        if value is None:
            delattr(target, keyword)
        else:
            setattr(target, keyword, value)
    return made


def test_activity_decayed_until_the_start_of_the_scan():
    """3600 s after injection, 370 MBq have become 370 * 2^(-3600/6586.2) = 253.3 MBq: 74,000 g / 253.3 MBq."""
    decayed = 370e6 * 2 ** (-3600 / 6586.2)

    assert decayed == pytest.approx(253.3e6, rel=1e-3)
    assert suv_factor(header()) == pytest.approx(74_000 / decayed)


def test_activity_corrected_to_the_injection_is_not_decayed_again():
    assert suv_factor(header(DecayCorrection="ADMIN")) == pytest.approx(74_000 / 370e6)


def test_a_series_made_after_its_images_counts_from_the_first_image():
    assert suv_factor(header(SeriesTime="180000")) == pytest.approx(74_000 / (370e6 * 2 ** (-3630 / 6586.2)))


def test_an_injection_before_midnight_is_of_the_day_before():
    late = header(RadiopharmaceuticalStartTime="233000", SeriesTime="003000", AcquisitionTime="003010")

    assert suv_factor(late) == pytest.approx(74_000 / (370e6 * 2 ** (-3600 / 6586.2)))


def test_a_full_date_and_time_of_injection_is_preferred():
    dated = header(RadiopharmaceuticalStartDateTime="20260102090000.000000")

    assert suv_factor(dated) == pytest.approx(74_000 / (370e6 * 2 ** (-7200 / 6586.2)))


def test_images_in_grams_per_millilitre_are_suv_already():
    assert suv_factor(header(Units="GML", PatientWeight=None)) == 1.0


def test_counts_of_philips_have_a_factor_of_their_own():
    counted = header(Units="CNTS")
    counted.add_new((0x7053, 0x0010), "LO", "Philips PET Private Group")
    counted.add_new((0x7053, 0x1000), "DS", "0.000384")

    assert suv_factor(counted) == pytest.approx(0.000384)


@pytest.mark.parametrize(
    ("changes", "keyword"),
    [
        ({"PatientWeight": None}, "PatientWeight"),
        ({"PatientWeight": "0"}, "PatientWeight"),
        ({"RadionuclideTotalDose": None}, "RadionuclideTotalDose"),
        ({"RadionuclideHalfLife": ""}, "RadionuclideHalfLife"),
        ({"RadiopharmaceuticalStartTime": None}, "RadiopharmaceuticalStartTime"),
        ({"DecayCorrection": "NONE"}, "DecayCorrection"),
        ({"Units": "CNTS"}, "Units"),
        ({"Units": "PROPCPS"}, "Units"),
        ({"RadiopharmaceuticalInformationSequence": []}, "RadiopharmaceuticalInformationSequence"),
        ({"RadiopharmaceuticalStartDateTime": "20260103090000"}, "RadiopharmaceuticalStartDateTime"),
    ],
)
def test_what_is_missing_is_named(changes, keyword):
    with pytest.raises(NotApplicable, match=f"no_suv.*{keyword}"):
        suv_factor(header(**changes))
