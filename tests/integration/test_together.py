"""Small inputs of several studies in one forward: each gets what it would get alone, and fails alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydicom.uid import generate_uid

from dicom_node.errors import ModelRefused
from dicom_node.lifecycle import State
from dicom_node.manifest import parse
from tests.conformance.test_kinds import image
from tests.integration.test_flat import DRAWN
from tests.integration.test_line import Line, write_stubs
from tests.integration.test_networks import HEAD, folder_of, torchscript
from workers.bundle import Bundles
from workers.containment import walls
from workers.volume import load

pytestmark = pytest.mark.skipif(bool(walls().missing), reason=f"this kernel lacks {walls().missing}")

TOGETHER = "[execution]\ntogether = {{ size = {size}, wait_seconds = {wait} }}\n"


class Picky(torch.nn.Module):
    """Two channels: nothing, and what is brighter than a threshold; it breaks on what is brighter than it can be."""

    def __init__(self) -> None:
        super().__init__()
        self.soft = torch.nn.Conv2d(1, 1, 5, padding=2)
        torch.manual_seed(3)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        assert float(picture.max()) < 3500.0
        bright = self.soft(picture) * 0.001 + picture - 2500.0
        return torch.cat([torch.zeros_like(bright), bright], dim=1)


def radiograph(path, brightest=3000, place=10, columns=64):
    pixels = (np.arange(60)[:, None] * 5 + np.arange(columns)[None] * 9 + 100).astype(np.uint16)
    pixels[place : place + 7, 30:42] = brightest
    made = image(
        *("1.2.840.10008.5.1.4.1.1.1.1", pixels),
        Modality="DX",
        PhotometricInterpretation="MONOCHROME2",
        WindowCenter=600,
        WindowWidth=900,
        BodyPartExamined="CHEST",
        BitsStored=12,
        HighBit=11,
        PatientOrientation=["L", "F"],
        ImagerPixelSpacing=[0.2, 0.15],
        RescaleIntercept=0,
        RescaleSlope=1,
        RescaleType="US",
        PresentationLUTShape="IDENTITY",
        SOPInstanceUID=generate_uid(),
        SeriesInstanceUID=generate_uid(),
    )
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    made.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def bundles():
    made = Bundles(device="cpu")
    yield made
    made.close()


@pytest.fixture
def network(tmp_path):
    def write(size=4, wait=0.0):
        rest = TOGETHER.format(size=size, wait=wait) + DRAWN
        return folder_of(
            tmp_path / "models", "torchscript", "w.pt", torchscript(Picky(), tmp_path / "n.pt"), rest, "picky"
        )

    return write


def test_what_is_run_together_gets_what_it_would_get_alone(tmp_path, network, bundles):
    bundle = bundles.get(network(size=2))
    grids = [
        load([radiograph(tmp_path / f"{place}.dcm", place=place)], bundle.manifest.input).grid for place in (3, 20, 45)
    ]

    alone = [bundle.model(grid, lambda part: None) for grid in grids]
    together = bundle.model.many(grids, lambda part: None)

    for one, other in zip(alone, together, strict=True):
        assert one.labels.any()
        assert np.array_equal(one.labels, other.labels)
        assert other.certainty == pytest.approx(one.certainty, abs=1e-5)
        assert one.parameters == other.parameters


def test_what_cannot_be_stacked_is_refused_as_a_whole_and_run_alone_without_harm(tmp_path, network, bundles):
    bundle = bundles.get(network())
    narrow, wide = (
        load([radiograph(tmp_path / f"{columns}.dcm", columns=columns)], bundle.manifest.input).grid
        for columns in (64, 72)
    )

    with pytest.raises(ModelRefused):
        bundle.model.many([narrow, wide], lambda part: None)

    assert bundle.model(wide, lambda part: None).labels.any()


def test_studies_that_wait_go_through_the_model_at_once_and_the_one_that_breaks_it_fails_alone(
    tmp_path, network, monkeypatch
):
    network()
    write_stubs(tmp_path, monkeypatch)
    line = Line(tmp_path)

    def study(number, **options):
        path = radiograph(tmp_path / f"{number}.dcm", **options)
        return line.received([path], f"1.8.{number}", "picky")

    good = [study(number, place=10 + number) for number in range(3)]
    line.run(good[0])
    line.threads[-1].join(60)
    line.pipeline._clear()
    spans = {line.span(number, "model") for number in good}
    assert max(began for began, _ in spans) < min(ended for _, ended in spans)

    mixed = [study(5, place=30), study(6, brightest=3900), study(7, place=33)]
    line.run(mixed[0])
    line.finish()
    states = [line.job(number).state for number in (*good, *mixed)]
    line.ledger.close()

    assert states == [State.DONE] * 3 + [State.DONE, State.FAILED, State.DONE]


def test_only_a_network_of_two_dimensions_that_lists_no_boxes_can_be_asked_for_it():
    head = HEAD.format(name="n", runtime="torchscript", file="w.pt", sha256="0" * 64)
    together = TOGETHER.format(size=4, wait=0.1)

    assert parse(head + together + DRAWN).execution.together.size == 4
    with pytest.raises(Exception, match="together"):
        parse(head + together + DRAWN.replace("dimensions = 2\n", ""))
