"""SUVbw by hand, for each way that headers say it; and the element that is missing, by name."""

from __future__ import annotations

from copy import deepcopy
from datetime import datetime

import numpy as np
import pytest
from pydicom import Dataset, dcmread

from dicom_node.errors import NotApplicable
from dicom_node.manifest import InputSlot
from dicom_node.suv import first_acquisition, suv_factor
from tests.datasets import ct, write
from workers.volume import load


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
    counted.private_block(0x7053, "Philips PET Private Group", create=True).add_new(0x00, "DS", "0.000384")

    assert suv_factor(counted) == pytest.approx(0.000384)


def test_counts_of_philips_become_activity_where_only_that_factor_is_there():
    """1 count is 0.75 Bq/ml; the factor of SUV is 0, which is Philips' way to say that it is not known."""
    counted = header(Units="CNTS", DecayCorrection="ADMIN")
    block = counted.private_block(0x7053, "Philips PET Private Group", create=True)
    block.add_new(0x00, "DS", "0")
    block.add_new(0x09, "DS", "0.75")

    assert suv_factor(counted) == pytest.approx(0.75 * 74_000 / 370e6)


def test_a_factor_in_the_block_of_another_maker_is_not_that_of_philips():
    counted = header(Units="CNTS")
    counted.private_block(0x7053, "SOMEONE ELSE", create=True).add_new(0x00, "DS", "0.000384")

    with pytest.raises(NotApplicable, match="7053,1000"):
        suv_factor(counted)


def test_every_bed_of_a_processed_series_counts_from_the_first_image():
    """The second bed was acquired 5 minutes after the first; both are corrected to the start of the first."""
    first = header(SeriesTime="180000")
    second = deepcopy(first)
    second.AcquisitionTime = "110530"
    start = first_acquisition([second, first])

    assert start == datetime(2026, 1, 2, 11, 0, 30)
    assert suv_factor(second, start) == suv_factor(first, start) == suv_factor(first)
    assert suv_factor(second) != suv_factor(second, start)


def test_a_processed_series_of_ge_keeps_the_start_of_its_scan():
    processed = header(SeriesTime="180000")
    processed.private_block(0x0009, "GEMS_PETD_01", create=True).add_new(0x0D, "DT", "20260102105000.00")

    assert suv_factor(processed) == pytest.approx(74_000 / (370e6 * 2 ** (-3000 / 6586.2)))


def test_a_processed_series_of_siemens_counts_back_from_the_middle_of_the_frame():
    """A frame of 120 s has its average count rate after 59.9 s; that was 359.9 s after the start: 11:00:30 - 300 s."""
    processed = header(SeriesTime="180000")
    processed.FrameReferenceTime, processed.ActualFrameDuration = "359937", "120000"

    assert suv_factor(processed) == pytest.approx(74_000 / (370e6 * 2 ** (-3330 / 6586.2)), rel=1e-7)


def test_a_scan_that_begins_before_the_injection_is_of_the_same_day():
    """60 s before the injection the same tracer would have been more: 370 * 2^(60/6586.2)."""
    dynamic = header(RadiopharmaceuticalStartTime="110100")

    assert suv_factor(dynamic) == pytest.approx(74_000 / (370e6 * 2 ** (60 / 6586.2)))


def test_an_injection_in_another_zone_is_brought_into_that_of_the_images():
    """09:00 in UTC is 10:00 an hour further east."""
    dated = header(RadiopharmaceuticalStartDateTime="20260102090000.00+0000", TimezoneOffsetFromUTC="+0100")

    assert suv_factor(dated) == pytest.approx(suv_factor(header()))


def test_fractions_of_seconds_and_short_times_are_read():
    assert suv_factor(header(SeriesTime="1100", AcquisitionTime="110030.123")) == suv_factor(header())


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
        ({"RadiopharmaceuticalStartDateTime": "20251224100000"}, "RadiopharmaceuticalStartDateTime is .* half-lives"),
        ({"RadiopharmaceuticalStartTime": "soon"}, "RadiopharmaceuticalStartTime"),
        ({"SeriesDate": None, "AcquisitionTime": "x"}, "SeriesTime"),
        ({"RadionuclideTotalDose": "370"}, "RadionuclideTotalDose of 370 Bq"),
        ({"PatientWeight": "74000"}, "PatientWeight of 74000 kg"),
        ({"CorrectedImage": ["DECY", "SCAT"]}, "CorrectedImage does not say ATTN"),
        ({"Units": "GML", "SUVType": "LBM"}, "SUVType is LBM"),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_what_is_missing_is_named(changes, keyword):
    with pytest.raises(NotApplicable, match=f"no_suv.*{keyword}"):
        suv_factor(header(**changes))


@pytest.mark.filterwarnings("ignore:Invalid value for VR", "ignore:Value")
def test_a_weight_that_is_no_number_is_named(tmp_path):
    made = header(PatientWeight="74.5")
    made.save_as(tmp_path / "a", implicit_vr=False, little_endian=True)
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes().replace(b"74.5", b"much"))

    with pytest.raises(NotApplicable, match="PatientWeight"):
        suv_factor(dcmread(tmp_path / "a", force=True))


def test_two_tracers_are_not_mixed_up():
    doubled = header()
    doubled.RadiopharmaceuticalInformationSequence.append(deepcopy(doubled.RadiopharmaceuticalInformationSequence[0]))

    with pytest.raises(NotApplicable, match="names 2 tracers"):
        suv_factor(doubled)


def test_images_that_say_all_corrections_are_taken():
    assert suv_factor(header(CorrectedImage=["DECY", "ATTN", "SCAT"])) == suv_factor(header())


def pet(tmp_path, number, **changes):
    """A slice of 100 counts whose slope is its own number; the second half was acquired one bed later."""
    dataset = ct(number)
    dataset.Modality, dataset.RescaleIntercept, dataset.RescaleSlope = "PT", 0, number * 100
    for element in header(AcquisitionTime="110030" if number <= 4 else "110530", **changes):
        dataset[element.tag] = element
    dataset.PixelData = np.full((16, 16), 100, "<i2").tobytes()
    return write(dataset, tmp_path / f"{number}.dcm")


@pytest.mark.parametrize("series_time", ["110000", "180000"])
def test_a_series_of_two_beds_and_many_slopes_becomes_suv(tmp_path, series_time):
    """Slice n holds 100 * 100 n Bq/ml; all are corrected to one moment, so one factor holds for all."""
    paths = [pet(tmp_path, number, SeriesTime=series_time) for number in range(1, 9)]
    elapsed = 3600 if series_time == "110000" else 3630

    volume = load(paths, InputSlot(modality=("PT",)))

    uptake = 74_000 / (370e6 * 2 ** (-elapsed / 6586.2))
    by_slice = sorted(volume.grid.values.mean(axis=(1, 2)).tolist())
    assert by_slice == pytest.approx([10_000 * number * uptake for number in range(1, 9)], rel=1e-5)


def test_a_series_that_cannot_be_suv_is_not_for_a_model(tmp_path):
    paths = [pet(tmp_path, number, PatientWeight=None) for number in range(1, 9)]

    with pytest.raises(NotApplicable, match="PatientWeight"):
        load(paths, InputSlot(modality=("PT",)))
