"""Series as hospitals have them: jitter, repeats, strays, padding, bad headers, pixels that nobody can decode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom import DataElement, Dataset, dcmread, dcmwrite
from pydicom.data import get_testdata_file
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.pixels.utils import compress
from pydicom.uid import JPEG2000Lossless, RLELossless

from dicom_node.errors import InputRefused, NotApplicable
from dicom_node.findings import Reason
from dicom_node.manifest import InputSlot, Range
from tests.datasets import IMPLICIT, as_file, ct, write
from workers.fitness import check_input
from workers.volume import load

EXPLICIT_BYTES = b"1.2.840.10008.1.2.1\0"


@pytest.fixture
def series(tmp_path):
    """Write a series of CT slices 5 mm apart; `edit(number, dataset)` changes each first."""

    def make(edit=lambda number, dataset: None, slices=8, syntax=None):
        paths = []
        for number in range(1, slices + 1):
            dataset = ct(number)
            edit(number, dataset)
            path = tmp_path / f"{number}.dcm"
            paths.append(write(dataset, path, syntax) if syntax else write(dataset, path))
        return paths

    return make


def put(dataset: Dataset, keyword: str, value) -> None:
    """Set what a real scanner wrote, however wrong."""
    tag = tag_for_keyword(keyword)
    dataset[tag] = DataElement(tag, dictionary_VR(tag), value, validation_mode=0)


def filled(dataset: Dataset, value: int, kind: str = "<i2") -> None:
    dataset.PixelData = np.full((16, 16), value, kind).tobytes()


# -- which slices make the stack ----------------------------------------------------------------------------------


def test_slices_come_out_in_order_whatever_the_order_of_the_files(series):
    paths = series()

    volume = load([paths[n] for n in (5, 0, 7, 2, 1, 6, 4, 3)])

    assert [int(dataset.InstanceNumber) for dataset in volume.source.datasets] == list(range(1, 9))
    assert volume.notes == ()


def test_rounding_in_the_orientation_loses_no_slice(series):
    def edit(number, dataset):
        dataset.ImageOrientationPatient = [1, 0.00049 if number % 2 else 0.00051, 0, 0, 1, 0]

    volume = load(series(edit))

    assert len(volume.source.frames) == 8
    assert volume.notes == ()


def test_two_acquisitions_of_one_place_are_never_mixed(series):
    """Arterial and venous, say, with positions that differ in the sixth decimal, now this way, now that."""

    def edit(number, dataset):
        acquisition, slice_number = divmod(number - 1, 4)
        noise = 0.000001 if (acquisition + slice_number) % 2 else -0.000001
        dataset.AcquisitionNumber = acquisition + 1
        dataset.ImagePositionPatient = [0, 0, 5.0 * slice_number + 0.005 + noise]

    volume = load(series(edit))

    assert {int(dataset.AcquisitionNumber) for dataset in volume.source.datasets} == {1}
    assert volume.notes == ("4 images of another acquisition (AcquisitionNumber) left out",)


def test_a_localizer_of_another_orientation_is_left_out_and_noted(series):
    def edit(number, dataset):
        if number == 1:
            dataset.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]

    volume = load(series(edit))

    assert len(volume.source.frames) == 7
    assert volume.notes == ("1 images of another orientation, size or object left out",)


def test_a_tracker_image_far_away_is_left_out_and_counts_for_no_volume(series):
    def edit(number, dataset):
        if number == 8:
            dataset.ImagePositionPatient = [-100, -100, 900.0]

    volume = load(series(edit))

    assert len(volume.source.frames) == 7
    assert volume.grid.thickness.tolist() == [5.0] * 7


def test_a_sparse_scan_keeps_all_its_slices(series):
    def edit(number, dataset):
        dataset.ImagePositionPatient = [-100, -100, number * 20.0 + (20.0 if number > 4 else 0.0)]

    assert len(load(series(edit)).source.frames) == 8


def test_slices_of_two_frames_of_reference_are_not_one_volume(series):
    def edit(number, dataset):
        dataset.FrameOfReferenceUID = "1.2.3" if number <= 5 else "1.2.4"

    assert len(load(series(edit)).source.frames) == 5


def test_a_slice_alone_is_as_thick_as_it_says(series):
    volume = load(series(slices=1))

    assert volume.grid.spacing[0] == 5.0
    assert volume.grid.thickness.tolist() == [5.0]


# -- values -------------------------------------------------------------------------------------------------------


def test_ct_becomes_hounsfield_units_in_int16(series):
    def edit(number, dataset):
        filled(dataset, 1024 + number)

    volume = load(series(edit))

    assert volume.grid.values.dtype == np.int16
    assert volume.grid.values[:, 3, 3].tolist() == list(range(1, 9))


def test_values_that_int16_cannot_hold_are_not_cut_off(series):
    def edit(number, dataset):
        dataset.Modality, dataset.PixelRepresentation, dataset.RescaleIntercept = "MR", 0, 0
        filled(dataset, 60000, "<u2")

    volume = load(series(edit))

    assert volume.grid.values.dtype == np.float32
    assert volume.grid.values.max() == 60000


def test_each_slice_is_rescaled_by_its_own_slope(series):
    def edit(number, dataset):
        dataset.Modality, dataset.RescaleSlope, dataset.RescaleIntercept = "PT", 0.5 * number, 0
        filled(dataset, 10)

    assert load(series(edit)).grid.values[:, 0, 0].tolist() == [5.0 * number for number in range(1, 9)]


@pytest.mark.parametrize("syntax", [None, IMPLICIT])
@pytest.mark.parametrize(("padding", "limit", "stored"), [(-2000, None, -2000), (3000, None, 3000), (3000, 3100, 3050)])
def test_padding_is_air(series, padding, limit, stored, syntax):
    def edit(number, dataset):
        dataset.PixelPaddingValue = padding
        if limit is not None:
            dataset.PixelPaddingRangeLimit = limit
        filled(dataset, stored)

    assert np.unique(load(series(edit, syntax=syntax)).grid.values).tolist() == [-1024]


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_compressed_pixels_are_the_same_pixels(tmp_path, syntax):
    plain, packed = tmp_path / "plain.dcm", tmp_path / "packed.dcm"
    dataset = as_file(ct(1, Rows=64, Columns=64))  # OpenJPEG has no use for less
    dataset.PixelData = np.random.default_rng(0).integers(-500, 1500, (64, 64), np.int16).tobytes()
    dataset.save_as(plain, enforce_file_format=True)
    compress(dataset, syntax, generate_instance_uid=False)
    dataset.save_as(packed, enforce_file_format=True)

    np.testing.assert_array_equal(load([packed]).grid.values, load([plain]).grid.values)


@pytest.mark.parametrize("variant", ["RLE", "jp2klossless", "jpeg_ls_lossless", "bigendian", "implicit", "expb"])
def test_a_real_mr_image_is_the_same_in_every_transfer_syntax(variant):
    plain, other = get_testdata_file("MR_small.dcm"), get_testdata_file(f"MR_small_{variant}.dcm")

    np.testing.assert_array_equal(load([Path(other)]).grid.values, load([Path(plain)]).grid.values)


@pytest.mark.parametrize("name", ["MR_truncated.dcm", "JPGExtended.dcm", "rtplan_truncated.dcm", "image_dfl.dcm"])
def test_a_file_that_cannot_be_used_ends_in_a_reason(name):
    with pytest.raises((NotApplicable, InputRefused)):
        load([Path(get_testdata_file(name))])


# -- what is no volume, in words ----------------------------------------------------------------------------------

NO_GEOMETRY = {
    "no position": lambda dataset: dataset.__delitem__("ImagePositionPatient"),
    "no rows": lambda dataset: dataset.__delitem__("Rows"),
    "position is no number": lambda dataset: put(dataset, "ImagePositionPatient", ["nan", "0", "0"]),
    "rows and columns run the same way": lambda dataset: put(dataset, "ImageOrientationPatient", [1, 0, 0, 1, 0, 0]),
    "orientation is zero": lambda dataset: put(dataset, "ImageOrientationPatient", [0] * 6),
    "two values of position": lambda dataset: put(dataset, "ImagePositionPatient", [0, 0]),
    "spacing is zero": lambda dataset: put(dataset, "PixelSpacing", [0, 0]),
    "slope is no number": lambda dataset: put(dataset, "RescaleSlope", "nan"),
    "slope is infinite": lambda dataset: put(dataset, "RescaleSlope", "1e400"),
    "a cine": lambda dataset: put(dataset, "NumberOfFrames", "27"),
}


@pytest.mark.parametrize("fault", NO_GEOMETRY)
def test_a_series_without_geometry_is_not_applicable(series, fault):
    paths = series(lambda number, dataset: NO_GEOMETRY[fault](dataset))

    with pytest.raises(NotApplicable) as refused:
        load(paths)

    assert refused.value.reason == Reason.GEOMETRY_UNUSABLE


def test_no_files_are_no_volume():
    with pytest.raises(NotApplicable):
        load([])


def test_an_object_without_pixels_is_not_applicable(series):
    with pytest.raises(NotApplicable) as refused:
        load(series(lambda number, dataset: dataset.__delitem__("PixelData")))

    assert refused.value.reason == Reason.NO_PIXEL_DATA


def test_colour_is_not_applicable(series):
    def edit(number, dataset):
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, "RGB"

    with pytest.raises(NotApplicable) as refused:
        load(series(edit))

    assert refused.value.reason == Reason.WRONG_IMAGE_TYPE


def test_pixels_that_end_too_early_are_refused(series):
    def edit(number, dataset):
        dataset.PixelData = dataset.PixelData[:200]

    with pytest.raises(InputRefused):
        load(series(edit))


@pytest.mark.parametrize(
    ("uid", "name"),
    [
        ("1.2.840.10008.1.2.4.51", "JPEG Extended"),
        # pydicom has no name for it, until dicom_node.services gives it one
        ("1.2.840.10008.1.2.4.110", "1.2.840.10008.1.2.4.110|JPEG XL"),
        ("1.2.3.4.5", "1.2.3.4.5"),
    ],
)
def test_pixels_that_nobody_here_can_decode_are_refused_by_name(tmp_path, uid, name):
    path = write(ct(1), tmp_path / "1.dcm")
    content, value = path.read_bytes(), uid.encode() + b"\0" * (len(uid) % 2)
    start = content.index(EXPLICIT_BYTES)
    grown = len(value) - len(EXPLICIT_BYTES)
    length = int.from_bytes(content[140:144], "little") + grown
    path.write_bytes(
        content[:140]
        + length.to_bytes(4, "little")
        + content[144 : start - 2]
        + len(value).to_bytes(2, "little")
        + value
        + content[start + len(EXPLICIT_BYTES) :]
    )

    with pytest.raises(InputRefused, match=name):
        load([path])


def test_a_file_that_is_no_dicom_is_refused(tmp_path):
    path = tmp_path / "1.dcm"
    path.write_bytes(b"hello")

    with pytest.raises(InputRefused):
        load([path])


@pytest.mark.parametrize("keyword", ["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"])
def test_an_instance_without_a_name_is_refused(series, keyword):
    paths = series()
    nameless = dcmread(paths[2])
    del nameless[keyword]
    dcmwrite(paths[2], nameless)

    with pytest.raises(InputRefused):
        load(paths)


@pytest.mark.parametrize("keyword", ["SeriesInstanceUID", "StudyInstanceUID"])
def test_instances_of_two_series_are_never_one_volume(series, keyword):
    with pytest.raises(InputRefused, match=keyword):
        load(series(lambda number, dataset: put(dataset, keyword, "1.2.3") if number == 3 else None))


def test_a_private_sop_class_is_refused(series):
    with pytest.raises(InputRefused, match="SOP Class"):
        load(series(lambda number, dataset: put(dataset, "SOPClassUID", "1.2.840.113619.4.30")))


def test_bits_that_are_no_number_are_no_traceback(series):
    with pytest.raises((NotApplicable, InputRefused)):
        load(series(lambda number, dataset: put(dataset, "BitsStored", [16, 12])))


# -- is it what the model was made for ----------------------------------------------------------------------------

SLOTS = {
    Reason.WRONG_MODALITY: InputSlot(modality=("MR",)),
    Reason.WRONG_BODY_PART: InputSlot(modality=("CT",), body_part=("HEAD",)),
    Reason.WRONG_ORIENTATION: InputSlot(modality=("CT",), orientation="sagittal"),
    Reason.TOO_FEW_SLICES: InputSlot(modality=("CT",), frames=Range(min=9)),
    Reason.SPACING_OUT_OF_RANGE: InputSlot(modality=("CT",), slice_spacing=Range(max=4.0)),
    Reason.WRONG_IMAGE_TYPE: InputSlot(modality=("CT",), image_type_excludes=("SECONDARY",)),
}


@pytest.mark.parametrize("reason", SLOTS)
def test_a_series_the_model_was_not_made_for_has_its_reason(series, reason):
    def edit(number, dataset):
        dataset.BodyPartExamined, dataset.ImageType = "CHEST", ["DERIVED", "SECONDARY"]

    volume = load(series(edit))

    check_input(volume, InputSlot(modality=("CT",), body_part=("CHEST",), orientation="axial"))
    with pytest.raises(NotApplicable) as refused:
        check_input(volume, SLOTS[reason])
    assert refused.value.reason == reason


def test_a_body_part_that_is_not_stated_is_no_reason(series):
    check_input(load(series()), InputSlot(modality=("CT",), body_part=("CHEST",)))


def test_an_image_type_of_one_value_is_read_as_one_value(series):
    volume = load(series(lambda number, dataset: setattr(dataset, "ImageType", "LOCALIZER")))

    with pytest.raises(NotApplicable) as refused:
        check_input(volume, InputSlot(modality=("CT",)))

    assert refused.value.reason == Reason.WRONG_IMAGE_TYPE
