"""Every result kind on every kind of source: valid, sound, and where the mask is."""

from __future__ import annotations

import itertools
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import highdicom as hd
import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from dicom_node.demo.phantom import make_thorax, write_series
from dicom_node.errors import ResultRefused
from dicom_node.findings import Box, Code, Findings, Map
from dicom_node.forms import UNSEGMENTED, Form
from dicom_node.images import read_source
from dicom_node.labelling import derive_uid
from dicom_node.plane import in_image
from dicom_node.results import ORDER, encode_all
from dicom_node.results.contours import contours
from dicom_node.results.page import page
from dicom_node.selfcheck import require_sound
from tests.conformance.cases import GEOMETRIES, SMALL, context, encode_case, encoded, enhanced_from
from tests.conftest import ROOT

FORMS = (Form(), Form("LABELMAP"), UNSEGMENTED, Form("BINARY", 3))
KNOWN = (
    # dicom3tools knows neither a Device UID in Contributing Equipment nor a reference to a label map's segment
    "(0x0018,0x1002) UI Device UID",
    "this is a Standard Extended SOP Class",
    # nothing says which part of the body is shown, so nothing can say of which side it is
    "is only permitted to be empty when actually unknown",
    "Shall not be present for Referenced SOP Class that is not segmentation - attribute <ReferencedSegmentNumber>",
)


def filled(outlines, shape):
    """The pixels whose centres lie within an odd number of outlines."""
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    inside = np.zeros(shape, bool)
    for outline in outlines:
        for (x1, y1), (x2, y2) in itertools.pairwise(outline):
            crosses = (y1 > rows) != (y2 > rows)
            with np.errstate(divide="ignore", invalid="ignore"):
                inside ^= crosses & (columns < (x2 - x1) * (rows - y1) / (y2 - y1) + x1)
    return inside


@pytest.mark.parametrize("seed", range(12))
def test_outlines_have_every_pixel_on_its_own_side(seed):
    random = np.random.default_rng(seed)
    mask = random.random((17, 23)) < random.choice([0.2, 0.5, 0.8])

    assert np.array_equal(filled([outline.tolist() for outline in contours(mask)], mask.shape), mask)


def every_kind(source, findings, made):
    kinds = [kind for kind in ORDER if kind != "sc" or source.pixels]
    return encode_all(kinds, findings, source, made, FORMS)


def with_map(findings, source):
    shape = (len(source.frames), int(source.datasets[0].Rows), int(source.datasets[0].Columns))
    values = np.random.default_rng(1).random(shape).astype(np.float32)
    return replace(findings, maps=(Map("nodule", Code("122157", "DCM", "Probability"), values),))


def image(sop_class_uid: str, pixels: np.ndarray, **values) -> Dataset:
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = sop_class_uid, derive_uid(sop_class_uid, "instance")
    made.StudyInstanceUID, made.SeriesInstanceUID = derive_uid("study"), derive_uid(sop_class_uid, "series")
    made.PatientID, made.PatientName, made.PatientBirthDate, made.PatientSex = "4711", "Doe^Jo", "19600102", "O"
    made.StudyID, made.StudyDate, made.StudyTime, made.AccessionNumber = "1", "20260102", "101112", "A1"
    made.ReferringPhysicianName, made.InstanceNumber, made.SeriesNumber = "", 1, 3
    colour = pixels.shape[-1] == 3
    made.Rows, made.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    made.SamplesPerPixel = 3 if colour else 1
    made.BitsAllocated = made.BitsStored = pixels.dtype.itemsize * 8
    made.HighBit, made.PixelRepresentation = made.BitsStored - 1, 0
    if colour:
        made.PlanarConfiguration = 0
    for keyword, value in values.items():
        setattr(made, keyword, value)
    made.PixelData = pixels.tobytes()
    return made


def projection(folder: Path) -> Path:
    """A chest radiograph with a window and no place in the patient."""
    pixels = (np.arange(40)[:, None] * 20 + np.arange(52)[None] * 9).astype(np.uint16)
    made = image(
        *("1.2.840.10008.5.1.4.1.1.1.1", pixels),
        Modality="DX",
        PhotometricInterpretation="MONOCHROME1",
        PatientOrientation=["L", "F"],
        ImagerPixelSpacing=[0.2, 0.15],
        BodyPartExamined="CHEST",
        WindowCenter=600,
        WindowWidth=900,
        RescaleIntercept=0,
        RescaleSlope=1,
        RescaleType="US",
        PresentationLUTShape="INVERSE",
    )
    made.save_as(folder / "dx.dcm", enforce_file_format=True)
    return folder / "dx.dcm"


def cine(folder: Path) -> Path:
    """An ultrasound loop in colour."""
    pixels = np.random.default_rng(2).integers(0, 200, (5, 40, 52, 3), np.uint8)
    made = image(
        *("1.2.840.10008.5.1.4.1.1.3.1", pixels),
        Modality="US",
        PhotometricInterpretation="RGB",
        NumberOfFrames=5,
        BodyPartExamined="HEART",
    )
    made.save_as(folder / "us.dcm", enforce_file_format=True)
    return folder / "us.dcm"


def flat_case(path: Path, volume: Findings):
    """The findings of an axial case, moved to the first frames of a source without a place in the patient."""
    source = read_source([path])
    count = len(source.frames)
    first = volume.findings[0].box.frame
    labels = tuple(array[first : first + count] for array in volume.labels)
    # what is not on these frames is not there
    kept = [n for n, segment in enumerate(volume.segments) if (labels[segment.layer] == segment.value).any()]
    findings = tuple(
        replace(finding, box=replace(finding.box, frame=0), segment=kept.index(finding.segment))
        for finding in volume.findings
    )
    segments = tuple(volume.segments[n] for n in kept)
    return source, replace(volume, labels=labels, segments=segments, findings=findings)


@pytest.fixture(scope="module", params=["axial", "sagittal", "tilted", "enhanced", "projection", "cine"])
def said(case_of, request, tmp_path_factory):
    """A source, what was found in it, and every result of it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in ("projection", "cine"):
        path = {"projection": projection, "cine": cine}[request.param](folder)
        source, findings = flat_case(path, case_of().findings)
    else:
        case = case_of("axial" if request.param == "enhanced" else request.param)
        if request.param == "enhanced":
            case = encode_case(case.phantom, [enhanced_from(case.paths, folder)])
        source, findings = case.volume.source, case.findings
    findings = with_map(findings, source)
    return request.param, source, findings, every_kind(source, findings, context())


def test_every_kind_passes_the_nodes_own_check(said):
    name, source, _, results = said
    kinds = {result.kind for result in results}

    assert kinds >= {"sr", "gsps", "sc", "kos"}
    assert ("seg" in kinds) == (name != "cine")
    assert ("rtstruct" in kinds) == ("pm" in kinds) == (name not in ("projection", "cine"))
    for form in FORMS:
        require_sound([encoded(one.dataset) for one in results if one.form in (None, form.key)], source)


@pytest.mark.peer("dciodvfy")
def test_dciodvfy_finds_no_error_in_any_kind(said, tmp_path, tool):
    for number, result in enumerate(said[3]):
        path = tmp_path / f"{number}-{result.kind}.dcm"
        result.dataset.save_as(path, enforce_file_format=True)
        done = subprocess.run([tool("dciodvfy"), str(path)], capture_output=True, text=True)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if re.match("Error|Warning|Abort", line)]

        assert not [line for line in lines if not any(known in line for known in KNOWN)], path.name


def test_every_object_says_what_it_is(said):
    uids = set()
    for result in said[3]:
        made = result.dataset
        assert made.SeriesDescription == "AI Lungs 1.0.0 - RESEARCH"
        devices = [item.get("DeviceUID") for item in made.ContributingEquipmentSequence]
        assert context().model.device_uid in devices
        assert made.SpecificCharacterSet == "ISO_IR 192"
        uids.add(made.SOPInstanceUID)
    assert len(uids) == len(said[3])


def test_presentation_states_outline_each_segment_on_its_frames(said):
    """Drawn again from the lines alone, the mask comes back: left stays left."""
    _, source, findings, results = said
    states = [result.dataset for result in results if result.kind == "gsps"]
    shape = findings.labels[0].shape
    for number, segment in enumerate(findings.segments):
        lines: dict[int, list] = {}
        for annotation in (item for state in states for item in state.GraphicAnnotationSequence):
            if annotation.GraphicLayer == f"SEGMENT {number + 1}":
                place = annotation.ReferencedImageSequence[0]
                frame = frame_of(source, place)
                for line in annotation.get("GraphicObjectSequence", ()):
                    lines.setdefault(frame, []).append(np.array(line.GraphicData).reshape(-1, 2).tolist())
        drawn = np.zeros(shape, bool)
        for frame, outlines in lines.items():
            drawn[frame] = filled(outlines, shape[1:])

        assert np.array_equal(drawn, findings.labels[segment.layer] == segment.value), segment.label


def frame_of(source, place):
    number = int(place.get("ReferencedFrameNumber") or 1)
    return next(
        index
        for index, frame in enumerate(source.frames)
        if source.datasets[frame.instance].SOPInstanceUID == place.ReferencedSOPInstanceUID
        and frame.frame_number == number
    )


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_structure_sets_lie_in_the_patient_where_the_mask_does(case_of, geometry):
    case = case_of(geometry)
    source, findings = case.volume.source, case.findings
    (made,) = (result.dataset for result in encode_all(("rtstruct",), findings, source, context()))
    for segment, region in zip(findings.segments, made.ROIContourSequence, strict=True):
        drawn = np.zeros(findings.labels[0].shape, bool)
        lines: dict[int, list] = {}
        for outline in region.ContourSequence:
            frame = frame_of(source, outline.ContourImageSequence[0])
            points = np.array([float(value) for value in outline.ContourData]).reshape(-1, 3)
            on_image = in_image(points, source.header_of(frame))
            assert np.abs(on_image[:, 2]).max() < 0.01
            lines.setdefault(frame, []).append([*on_image[:, :2].tolist(), on_image[0, :2].tolist()])
        for frame, outlines in lines.items():
            drawn[frame] = filled(outlines, drawn.shape[1:])

        assert np.array_equal(drawn, findings.labels[segment.layer] == segment.value)


def test_label_maps_hold_the_mask_and_describe_the_background_last(case_of, tmp_path):
    case = case_of()
    results = encode_all(("seg",), case.findings, case.volume.source, context(), (Form("LABELMAP"),))
    for result, layer in zip(results, case.findings.layers, strict=True):
        made = hd.seg.segread(encoded_file(result.dataset, tmp_path))
        numbers = [int(item.SegmentNumber) for item in made.SegmentSequence]
        uids = [str(dataset.SOPInstanceUID) for dataset in case.volume.source.datasets]
        read = made.get_pixels_by_source_instance(
            uids, combine_segments=True, ignore_spatial_locations=True, assert_missing_frames_are_empty=True
        )
        expected = np.zeros(case.findings.labels[layer].shape, np.uint8)
        for number, segment in enumerate(case.findings.segments_of(layer), start=1):
            expected[case.findings.labels[layer] == segment.value] = number

        assert numbers == [*range(1, len(numbers)), 0]
        assert np.array_equal(read, expected)
        assert made.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.5"


def encoded_file(dataset, folder):
    path = folder / f"{dataset.SOPInstanceUID}.dcm"
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.peer("segimage2itkimage")
def test_dcmqi_reads_a_label_map(case_of, tmp_path, tool):
    case = case_of()
    (first, *_) = encode_all(("seg",), case.findings, case.volume.source, context(), (Form("LABELMAP"),))
    out = tmp_path / "out"
    out.mkdir()
    command = [tool("segimage2itkimage"), "--inputDICOM", str(encoded_file(first.dataset, tmp_path))]
    done = subprocess.run(
        [*command, "--outputDirectory", str(out), "-t", "nrrd"], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr
    assert list(out.glob("*.nrrd"))


def test_a_segmentation_of_too_many_frames_becomes_one_for_each_structure(case_of):
    case = case_of()
    results = encode_all(("seg", "sr"), case.findings, case.volume.source, context(), (Form("BINARY", 3),))
    objects = [result.dataset for result in results if result.kind == "seg"]

    assert [len(made.SegmentSequence) for made in objects] == [1] * len(case.findings.segments)
    assert len({made.SeriesInstanceUID for made in objects}) == len(objects)
    assert len({made.SeriesNumber for made in objects}) == len(objects)
    require_sound([encoded(result.dataset) for result in results], case.volume.source)


def test_a_map_holds_the_probabilities(case_of):
    case = case_of()
    findings = with_map(case.findings, case.volume.source)
    (made,) = (result.dataset for result in encode_all(("pm",), findings, case.volume.source, context()))
    values = np.frombuffer(made.FloatPixelData, np.float32).reshape(findings.maps[0].values.shape)
    uids = [
        str(frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID)
        for frame in made.PerFrameFunctionalGroupsSequence
    ]
    order = [uids.index(str(case.volume.source.dataset_of(n).SOPInstanceUID)) for n in range(len(uids))]

    assert np.array_equal(values[order], findings.maps[0].values)


# -- the picture --------------------------------------------------------------------------------------------------


def test_the_picture_shows_the_right_lung_on_the_left_and_the_box_in_its_colour(case_of):
    case = case_of()
    shown = page(case.findings, case.volume.source, context())[70:1130, :1110].astype(int)
    organ = next(segment for segment in case.findings.segments if segment.label == "Right lung")
    plain = page(Findings(looked_for=case.findings.looked_for), case.volume.source, context())
    redder = (shown[..., 0] - shown[..., 2] > 60) & (shown[..., 0] > 120)
    yellow = (np.abs(shown - (255, 210, 0)).max(axis=-1) < 30).sum()

    assert organ.colour[0] > organ.colour[2]
    assert redder[:, : shown.shape[1] // 2].sum() > 20 * redder[:, shown.shape[1] // 2 :].sum() + 1000
    assert yellow > 200
    assert plain.shape == (1200, 1600, 3)


def test_the_disclaimer_is_in_the_pixels(case_of):
    case = case_of()
    one = page(case.findings, case.volume.source, context(disclaimer="Not for diagnosis."))
    two = page(case.findings, case.volume.source, context(disclaimer=""))
    rows = np.flatnonzero((one != two).any(axis=(1, 2)))

    assert len(rows) > 8
    assert rows.min() > 1136  # the bar at the bottom, nowhere else


def test_a_capture_is_marked_as_burned_in_derived_and_secondary(case_of):
    case = case_of()
    (made,) = (result.dataset for result in encode_all(("sc",), case.findings, case.volume.source, context()))
    shown = {str(item.ReferencedSOPInstanceUID) for item in made.SourceImageSequence}

    assert made.BurnedInAnnotation == "YES"
    assert list(made.ImageType)[:2] == ["DERIVED", "SECONDARY"]
    assert str(case.volume.source.dataset_of(case.findings.findings[0].box.frame).SOPInstanceUID) in shown
    assert context().disclaimer in made.DerivationDescription


def test_a_negative_result_has_a_picture_and_no_presentation_state(case_of):
    case = case_of(organs=False, found=False)
    results = encode_all(ORDER, case.findings, case.volume.source, context())

    assert {result.kind for result in results} == {"sr", "sc"}


def test_a_source_without_pixels_is_refused_a_picture(case_of):
    case = case_of()
    with pytest.raises(ResultRefused, match="pixels"):
        encode_all(("sc",), case.findings, replace(case.volume.source, pixels=None), context())


# -- told apart ---------------------------------------------------------------------------------------------------


def test_a_partial_answer_says_so_and_a_whole_one_does_not(case_of):
    case = case_of()
    partial = replace(case.findings, incomplete=("the upper lobes are not in the images",))
    flags = {}
    for name, findings in (("whole", case.findings), ("partial", partial)):
        (made,) = (
            result.dataset for result in encode_all(("sr",), findings, case.volume.source, context(), (UNSEGMENTED,))
        )
        flags[name] = (made.CompletionFlag, made.get("CompletionFlagDescription"))

    assert flags == {"whole": ("COMPLETE", None), "partial": ("PARTIAL", partial.incomplete[0])}


def moved(results, kind):
    """A copy of one object with a coordinate that is not on its image."""
    made = next(result.dataset for result in results if result.kind == kind and result.form in (None, ""))
    if kind == "gsps":
        line = next(a for a in made.GraphicAnnotationSequence if "GraphicObjectSequence" in a).GraphicObjectSequence[0]
        line.GraphicData = [value + 500 for value in line.GraphicData]
    else:
        outline = made.ROIContourSequence[0].ContourSequence[0]
        outline.ContourData = [float(value) + 900 for value in outline.ContourData]
    return made


@pytest.mark.parametrize("kind", ["gsps", "rtstruct"])
def test_a_line_beside_its_image_is_stopped(case_of, kind):
    case = case_of()
    results = encode_all((kind,), case.findings, case.volume.source, context())
    require_sound([encoded(result.dataset) for result in results], case.volume.source)
    with pytest.raises(ResultRefused, match="outside its image"):
        require_sound([encoded(moved(results, kind))], case.volume.source)


def test_real_cine_frames_get_a_report_and_a_picture(shared_data):
    """A real ultrasound loop: the box stands on the frame it was found on."""
    path = next(path for path in sorted((shared_data / "us_cine").rglob("*")) if path.is_file() and is_dicom(path))
    source = read_source([path])
    header = source.header_of(0)
    frame = len(source.frames) - 1
    box = Box(frame, 10.0, 20.0, float(header.Columns) / 2, float(header.Rows) / 2)
    finding = replace(_finding(), box=box)
    results = encode_all(ORDER, Findings(findings=(finding,)), source, context())
    require_sound([encoded(result.dataset) for result in results], source)
    report = next(result.dataset for result in results if result.kind == "sr")
    frames = re.findall(r"Referenced Frame Number\s+IS: '?(\d+)", str(report))

    assert {result.kind for result in results} >= {"sr", "sc"}
    assert str(frame + 1) in frames


def _finding():
    from dicom_node.findings import Finding

    return Finding(
        label="Nodule 1",
        finding=Code("27925004", "SCT", "Nodule"),
        category=Code("49755003", "SCT", "Morphologically abnormal structure"),
        box=Box(0, 0.0, 0.0, 1.0, 1.0),
        confidence=0.5,
        tracking_identifier="Nodule 1",
        tracking_uid=derive_uid("nodule"),
    )


def is_dicom(path):
    try:
        return bool(dcmread(path, stop_before_pixels=True).SOPInstanceUID)
    except Exception:
        return False


def test_the_example_of_the_architecture_runs(tmp_path, monkeypatch):
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "ARCHITECTURE.md").read_text(), re.DOTALL)
    (tmp_path / "study").mkdir()
    write_series(make_thorax(**SMALL), tmp_path / "study")
    monkeypatch.chdir(tmp_path)
    names: dict = {}

    exec(example, names)

    made = sorted(tmp_path.glob("*.dcm"))
    assert [path.stem.split("-")[1] for path in made] == ["seg", "sr", "gsps", "sc"]
    require_sound([path.read_bytes() for path in made], names["source"])
