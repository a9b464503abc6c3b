"""What is read quickly is what pydicom reads, bit for bit; what is not understood is left to it."""

from __future__ import annotations

import random

import imagecodecs
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.encaps import encapsulate, encapsulate_extended, get_frame
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from dicom_node.decoders import meaning_of_words
from dicom_node.demo.phantom import make_thorax, write_series
from dicom_node.errors import InputRefused
from dicom_node.manifest import InputSlot
from dicom_node.results.packing import run_lengths
from tests.conformance.cases import GEOMETRIES, SMALL
from tests.datasets import BIG_ENDIAN, DEFLATED, EXPLICIT, IMPLICIT, ct, write
from workers import volume
from workers.plain import Headers, glance
from workers.volume import load

CHANCE = np.random.default_rng(11)


def both(monkeypatch, paths, slot=None, quick=True):
    """Load twice, quickly and by pydicom alone, and hold one against the other; return the first."""
    assert all((glance(path) is not None) == quick for path in paths)
    ours = load(paths, slot)
    with monkeypatch.context() as patched:
        patched.setattr(volume, "glance", lambda path: None)
        theirs = load(paths, slot)
    assert ours.grid.values.dtype == theirs.grid.values.dtype
    assert np.array_equal(ours.grid.values, theirs.grid.values)
    assert ours.grid.values.flags.c_contiguous
    for name in ("positions", "thickness", "directions", "origins"):
        assert np.array_equal(getattr(ours.grid, name), getattr(theirs.grid, name))
    for name in ("spacing", "stack", "modality", "placed"):
        assert getattr(ours.grid, name) == getattr(theirs.grid, name)
    assert (ours.order, ours.flipped, ours.notes) == (theirs.order, theirs.flipped, theirs.notes)
    assert ours.source.frames == theirs.source.frames
    assert list(ours.source.datasets) == list(theirs.source.datasets)
    return ours


def series(folder, edit=lambda number, dataset: None, syntax=EXPLICIT, slices=6):
    paths = []
    for number in range(1, slices + 1):
        dataset = ct(number)
        dataset.PixelData = CHANCE.integers(0, 256, 512, np.uint8).tobytes()
        dataset.AcquisitionTime = f"10101{number % 3}.5"
        edit(number, dataset)
        paths.append(write(dataset, folder / f"{number}.dcm", syntax))
    return [paths[n] for n in CHANCE.permutation(len(paths))]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_volume_is_the_same_in_every_geometry(tmp_path, monkeypatch, geometry):
    phantom = make_thorax(**{**SMALL, **GEOMETRIES[geometry], "noise": 20.0}, seed=7)
    paths = write_series(phantom, tmp_path)

    made = both(monkeypatch, [paths[n] for n in CHANCE.permutation(len(paths))])

    numbers = [int(header.InstanceNumber) - 1 for header in made.source.datasets]
    assert np.array_equal(made.to_source(made.grid.values), phantom.hu[numbers])


def packed(dataset, frames=None):
    """The dataset in run lengths; its frames other ones, where there are any."""
    if frames is None:
        words = np.frombuffer(dataset.PixelData, f"<u{dataset.BitsAllocated // 8}")
        frames = [run_lengths(words.reshape(dataset.Rows, dataset.Columns))]
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    return dataset


ENCODE = {
    JPEG2000Lossless: lambda words: imagecodecs.jpeg2k_encode(words, codecformat="J2K", level=0, reversible=True),
    JPEGLSLossless: imagecodecs.jpegls_encode,
    JPEGLosslessSV1: lambda words: imagecodecs.jpeg8_encode(
        np.ascontiguousarray(words).view(f"u{words.itemsize}"),
        **{"lossless": True, "predictor": 1, "bitspersample": 8 * words.itemsize},
    ),
}


def coded(dataset, syntax):
    """The dataset with its frame compressed, as what its header says that its words are."""
    kind = "i" if dataset.PixelRepresentation and syntax == JPEG2000Lossless else "u"
    words = np.frombuffer(dataset.PixelData, f"<{kind}{dataset.BitsAllocated // 8}")
    return packed(dataset, [bytes(ENCODE[syntax](words.reshape(dataset.Rows, dataset.Columns)))])


def coded_series(folder, edit=lambda number, dataset: None, slices=6, syntax=JPEG2000Lossless):
    return series(folder, lambda number, dataset: edit(number, coded(dataset, syntax)), syntax, slices)


def wavelet_series(folder, edit=lambda number, dataset: None, slices=6):
    return coded_series(folder, edit, slices)


def near_series(folder, edit=lambda number, dataset: None, slices=6):
    return coded_series(folder, edit, slices, JPEGLSLossless)


def predicted_series(folder, edit=lambda number, dataset: None, slices=6):
    return coded_series(folder, edit, slices, JPEGLosslessSV1)


def packed_series(folder, edit=lambda number, dataset: None, slices=6):
    return series(folder, lambda number, dataset: edit(number, packed(dataset)), RLELossless, slices)


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, RLELossless, *ENCODE])
@pytest.mark.parametrize(
    ("allocated", "stored", "high"), [(16, 16, 15), (16, 12, 11), (16, 10, 9), (16, 15, 14), (8, 8, 7), (8, 5, 4)]
)
@pytest.mark.parametrize("signed", [0, 1])
def test_values_are_the_same_whatever_their_bits(tmp_path, monkeypatch, syntax, allocated, stored, high, signed):
    def edit(number, dataset):
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = allocated, stored, high
        dataset.PixelRepresentation = signed
        dataset.PixelData = dataset.PixelData[: 256 * allocated // 8]
        dataset["PixelData"].VR = "OW" if allocated > 8 or syntax == IMPLICIT else "OB"
        if syntax == RLELossless:
            packed(dataset)
        elif syntax in ENCODE:
            coded(dataset, syntax)

    both(monkeypatch, series(tmp_path, edit, syntax))


@pytest.mark.parametrize(
    ("slope", "intercept"),
    [(1, -1024), (1, 0), (2, -5), (0.5, 0.25), (-1, 3), (1.0000001, -1024), (1, -40000), (3000, 0)],
)
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_values_are_the_same_whatever_their_scale(tmp_path, monkeypatch, modality, slope, intercept):
    def edit(number, dataset):
        dataset.Modality = modality
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept

    both(monkeypatch, series(tmp_path, edit))


def test_every_slice_has_its_own_slope(tmp_path, monkeypatch):
    def edit(number, dataset):
        dataset.Modality, dataset.RescaleSlope, dataset.RescaleIntercept = "MR", f"{0.1 * number:.6f}", 0
        dataset.PixelData = np.full(256, 100 + number, "<i2").tobytes()

    made = both(monkeypatch, series(tmp_path, edit))

    assert np.allclose(made.grid.values[:, 4, 4], [(100 + n) * 0.1 * n for n in range(1, 7)])


def test_padding_is_air_on_either_way(tmp_path, monkeypatch):
    def edit(number, dataset):
        pixels = CHANCE.integers(-5, 5, 256).astype("<i2")
        dataset.PixelData = pixels.tobytes()
        dataset.add_new("PixelPaddingValue", "SS", -3)
        if number > 3:
            dataset.add_new("PixelPaddingRangeLimit", "SS", -1)

    both(monkeypatch, series(tmp_path, edit))


def test_acquisitions_are_told_apart_on_either_way(tmp_path, monkeypatch):
    def edit(number, dataset):
        acquisition, place = divmod(number - 1, 6)
        dataset.AcquisitionNumber, dataset.ImagePositionPatient = acquisition + 1, [0, 0, 5.0 * place]
        dataset.AcquisitionTime = f"10{number:02}00"

    made = both(monkeypatch, series(tmp_path, edit, slices=12))

    assert made.notes == ("6 images of another acquisition (AcquisitionNumber) left out",)


def test_files_that_are_not_understood_are_read_among_the_others(tmp_path, monkeypatch):
    paths = series(tmp_path)
    write(dcmread(paths[2]), paths[2], DEFLATED)
    assert [glance(path) is None for path in paths].count(True) == 1

    monkeypatch.setattr(volume, "glance", lambda path, look=glance: look(path))
    quick = load(paths)
    monkeypatch.setattr(volume, "glance", lambda path: None)
    assert np.array_equal(quick.grid.values, load(paths).grid.values)


def test_other_syntaxes_are_left_to_pydicom(tmp_path, monkeypatch):
    both(monkeypatch, series(tmp_path, syntax=BIG_ENDIAN), quick=False)

    assert glance(write(ct(1), tmp_path / "deflated.dcm", DEFLATED)) is None


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param({"SamplesPerPixel": 3}, id="colour"),
        pytest.param({"NumberOfFrames": 2}, id="frames"),
        pytest.param({"BitsAllocated": 32}, id="32 bits"),
        pytest.param({"Rows": 17}, id="fewer pixels than rows"),
        pytest.param({"ImagePositionPatient": None}, id="no position"),
    ],
)
def test_other_images_are_left_to_pydicom(tmp_path, edit):
    dataset = ct(1)
    for keyword, value in edit.items():
        setattr(dataset, keyword, value)

    assert glance(write(ct(1), tmp_path / "plain.dcm")) is not None
    assert glance(write(dataset, tmp_path / "other.dcm")) is None


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (13, 15), (64, 600)])
@pytest.mark.parametrize("syntax", [EXPLICIT, RLELossless])
@pytest.mark.parametrize("bits", [8, 16])
def test_values_are_the_same_whatever_the_size_of_an_image(tmp_path, monkeypatch, size, syntax, bits):
    def edit(number, dataset):
        dataset.Rows, dataset.Columns = size
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
        words = CHANCE.integers(0, 1 << bits, size).astype(f"<u{bits // 8}")
        dataset.PixelData = words.tobytes() + b"\7" * (words.nbytes % 2)  # what pads it may be anything
        dataset["PixelData"].VR = "OW" if bits > 8 else "OB"
        if syntax == RLELossless:
            packed(dataset, [run_lengths(words)])

    both(monkeypatch, series(tmp_path, edit, syntax))


@pytest.mark.parametrize("padding", [None, 3])
def test_run_lengths_as_pydicom_writes_them(tmp_path, monkeypatch, padding):
    def edit(number, dataset):
        if padding is not None:
            dataset.add_new("PixelPaddingValue", "SS", padding)

    paths = series(tmp_path, edit)
    for path in paths:
        dataset = dcmread(path)
        dataset.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
        dataset.save_as(path)

    both(monkeypatch, paths)


def test_run_lengths_and_others_are_one_series(tmp_path, monkeypatch):
    paths = series(tmp_path)
    for path in paths[::2]:
        dataset = packed(dcmread(path))
        dataset.file_meta.TransferSyntaxUID = RLELossless
        dataset.save_as(path)

    both(monkeypatch, paths)


def item(content):
    return b"\xfe\xff\x00\xe0" + len(content).to_bytes(4, "little") + content


def after(dataset, *items):
    """The dataset with other items in its pixel data, then the delimiter."""
    dataset.PixelData = b"".join(items)
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    return dataset


FRAME = run_lengths(np.arange(256, dtype="<u2").reshape(16, 16))


@pytest.mark.filterwarnings("ignore:The decoded RLE segment")
@pytest.mark.parametrize(
    "items",
    [
        pytest.param([item(bytes(4)), item(FRAME)], id="an offset"),
        pytest.param([item(b""), item(FRAME)], id="no offset"),
        pytest.param([item(b""), item(FRAME + bytes(40))], id="more than the image"),
    ],
)
def test_a_fragment_is_found_behind_every_table(tmp_path, monkeypatch, items):
    made = both(monkeypatch, series(tmp_path, lambda number, dataset: after(dataset, *items), RLELossless))

    assert np.array_equal(made.grid.values[0], np.arange(256).reshape(16, 16) + float(ct(1).RescaleIntercept))


@pytest.mark.parametrize(
    "items",
    [
        pytest.param([item(b""), item(FRAME[:80]), item(FRAME[80:])], id="two fragments"),
        pytest.param([item(b""), item(FRAME[:200])], id="too short"),
        pytest.param([item(b""), item(b"\3" + FRAME[1:])], id="three segments"),
        pytest.param([item(b""), item(b"")], id="nothing"),
        pytest.param([item(b"")], id="no fragment"),
        pytest.param([item(bytes(8)), item(FRAME)], id="two offsets"),
        pytest.param([item(bytes([2, 0, 0, 0])), item(FRAME)], id="another offset"),
    ],
)
def test_fragments_that_are_not_understood_get_the_answer_of_pydicom(tmp_path, monkeypatch, items):
    def edit(number, dataset):
        if number == 2:
            after(dataset, *items)

    paths = packed_series(tmp_path, edit)

    assert_same_answer(monkeypatch, paths)


def assert_same_answer(monkeypatch, paths):
    answers = []
    for look in (glance, lambda path: None):
        monkeypatch.setattr(volume, "glance", look)
        try:
            made = load(paths)
            answers.append((made.grid.values.tobytes(), made.grid.origins.tolist(), made.notes))
        except Exception as error:
            answers.append((type(error), str(error)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("syntax", ENCODE)
def test_a_frame_in_several_fragments_is_decoded_whole(tmp_path, monkeypatch, syntax):
    def edit(number, dataset):
        if number == 2:
            frame = get_frame(coded(dataset, syntax).PixelData, 0, number_of_frames=1)
            dataset.PixelData = encapsulate([frame], fragments_per_frame=3, has_bot=False)
            dataset["PixelData"].VR = "OB"
        else:
            coded(dataset, syntax)

    made = both(monkeypatch, series(tmp_path, edit, syntax))

    assert all(np.ptp(plane) for plane in made.grid.values)


@pytest.mark.parametrize("syntax", ENCODE)
def test_a_frame_that_says_it_is_larger_than_its_image_is_refused(tmp_path, syntax):
    """The decoders would make room for what it says."""

    def edit(number, dataset):
        if number == 2:
            large = ct(1)
            large.Rows = large.Columns = 64
            large.PixelData = CHANCE.integers(0, 256, 64 * 64 * 2, np.uint8).tobytes()
            dataset.PixelData = coded(large, syntax).PixelData
            dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
        else:
            coded(dataset, syntax)

    with pytest.raises(InputRefused, match="larger than its image"):
        load(series(tmp_path, edit, syntax))


def test_frames_with_an_extended_table_of_offsets_are_left_to_pydicom(tmp_path):
    dataset = packed(ct(1))
    assert glance(write(dataset, tmp_path / "basic.dcm", RLELossless)) is not None
    dataset.PixelData, dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = encapsulate_extended([FRAME])

    assert glance(write(dataset, tmp_path / "extended.dcm", RLELossless)) is None


def test_an_image_that_its_fragment_cannot_be_is_not_made_room_for(tmp_path):
    """A byte stands for 64 at most; what claims more is refused as it is for every file, before there is room."""
    small, large = packed(ct(1)), packed(ct(2))
    large.Rows = large.Columns = 65535
    paths = [write(each, tmp_path / f"{each.InstanceNumber}.dcm", RLELossless) for each in (small, large)]

    assert [glance(path) is None for path in paths] == [False, True]
    with pytest.raises(InputRefused, match="more than a file of"):
        load(paths)


def test_a_file_that_ends_early_is_refused_as_ever(tmp_path):
    paths = series(tmp_path)
    paths[1].write_bytes(paths[1].read_bytes()[:-10])

    assert glance(paths[1]) is None
    with pytest.raises(InputRefused):
        load(paths)


@pytest.mark.parametrize("make", [packed_series, wavelet_series, near_series, predicted_series])
@pytest.mark.parametrize("cut", [2, 4, 8, 10, 300])
def test_frames_that_end_early_get_the_answer_of_pydicom(tmp_path, monkeypatch, make, cut):
    paths = make(tmp_path)
    paths[1].write_bytes(paths[1].read_bytes()[:-cut])

    assert_same_answer(monkeypatch, paths)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [series, packed_series, wavelet_series, near_series, predicted_series])
def test_whatever_the_bytes_both_ways_say_the_same_or_refuse(tmp_path, monkeypatch, make):
    """A byte of a header is anything: the quick way gives what the other gives, or stands aside."""
    chance = random.Random(5)
    paths = make(tmp_path, slices=3)
    original = paths[1].read_bytes()
    pixels = original.index(b"\xe0\x7f\x10\x00")
    quick = 0
    for _ in range(150):
        data = bytearray(original)
        data[chance.randrange(340, pixels + 100)] = chance.choice((0, 32, 48, 49, 92, 255, chance.randrange(256)))
        paths[1].write_bytes(data)
        quick += glance(paths[1]) is not None
        assert_same_answer(monkeypatch, paths)
    assert quick > 50


@pytest.mark.parametrize("make", [series, packed_series, wavelet_series, near_series, predicted_series])
def test_headers_of_a_series_are_read_only_where_somebody_asks(tmp_path, monkeypatch, make):
    paths = make(tmp_path)
    read = []
    reader = volume.read_header
    monkeypatch.setattr("workers.plain.read_header", lambda path: read.append(path) or reader(path))
    monkeypatch.setattr(volume, "read_header", lambda path: read.append(path) or reader(path))

    made = load(paths, InputSlot(modality=["CT"]))

    assert isinstance(made.source.datasets, Headers)
    assert len(read) <= 2
    assert len(made.source.datasets.different()) == 1
    assert [int(header.InstanceNumber) for header in made.source.datasets] == [1, 2, 3, 4, 5, 6]
    assert len(read) == 6


@pytest.mark.parametrize(("allocated", "stored"), [(8, 8), (16, 12), (16, 16)])
@pytest.mark.parametrize("signed", [0, 1])
def test_the_meaning_of_a_word_is_what_a_pixel_of_it_is_decoded_to(allocated, stored, signed):
    header = ct(1)
    header.BitsAllocated, header.BitsStored, header.HighBit = allocated, stored, stored - 1
    header.PixelRepresentation = signed

    table = meaning_of_words(header)

    assert len(table) == 1 << allocated
    word = (1 << stored) - 1
    assert int(table[word]) == (-1 if signed else word)


@pytest.mark.data
@pytest.mark.parametrize("name", ["chest_ct_lung_dx_a0001", "head_ct_ge_tilted", "head_mr_t1_sagittal"])
def test_real_series_are_the_same(monkeypatch, shared_data, name):
    both(monkeypatch, sorted(path for path in (shared_data / name / "series").rglob("*") if path.is_file()))


@pytest.mark.data
@pytest.mark.parametrize("name", ["chest_ct_lung_dx_a0001", "head_ct_ge_tilted", "head_mr_t1_sagittal"])
@pytest.mark.parametrize("syntax", ENCODE)
def test_real_series_are_the_same_compressed(tmp_path, monkeypatch, shared_data, name, syntax):
    originals = sorted(path for path in (shared_data / name / "series").rglob("*") if path.is_file())[:24]
    paths = []
    for number, path in enumerate(originals):
        dataset = coded(dcmread(path), syntax)
        dataset.file_meta.TransferSyntaxUID = syntax
        paths.append(tmp_path / f"{number}.dcm")
        dataset.save_as(paths[-1], implicit_vr=False, little_endian=True, force_encoding=True)

    made = both(monkeypatch, paths)

    assert np.array_equal(made.grid.values, load(originals).grid.values)
