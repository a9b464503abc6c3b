"""A stroke among screening, with the real processes: it overtakes, interrupts, and is delivered first."""

from __future__ import annotations

from io import BytesIO

import pytest
from pydicom import dcmread

from dicom_node.demo.phantom import make_thorax, write_series
from tests.acceptance.stand import storescu, wait_for
from tests.conftest import ROOT
from tests.integration.test_line import MANIFEST, STUB
from workers.containment import walls

pytestmark = [
    pytest.mark.peer("storescu"),
    pytest.mark.peer("Orthanc"),
    pytest.mark.skipif(bool(walls().missing), reason=f"this kernel lacks {walls().missing}"),
]

STROKE = """
[[route]]
name = "stroke"
when = { SeriesDescription = "Phantom 7" }
run = "quick"
send_to = "PACS"
priority = "urgent"
"""


def study(folder, seed):
    return write_series(make_thorax(slices=8, size=(64, 64), spacing=(30.0, 5.0, 5.0), seed=seed), folder)


def test_a_stroke_is_delivered_while_screening_waits_and_nothing_is_lost(node, orthanc, tmp_path, monkeypatch):
    package, models = tmp_path / "packages" / "stub_of_a_device", tmp_path / "models"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STUB)
    for name, windows in (("quick", 5), ("slow", 100)):
        (models / name).mkdir(parents=True)
        (models / name / "model.toml").write_text(MANIFEST.format(name=name, runtime="python", windows=windows))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{package.parent}")
    running = node(pacs_port=orthanc.dicom_port, models=["slow"], node=f'models = "{models}"')
    text = running.settings_path.read_text().replace(
        'when = { Modality = "CT" }', 'when = { SeriesDescription = "Phantom [12]" }\npriority = "background"'
    )
    running.settings_path.write_text(text + STROKE)
    running.start()
    for seed in (1, 2):
        storescu(running.port, *study(tmp_path / str(seed), seed))

    def at_model():
        return [job for job in running.jobs() if job["model"] == "slow" and job["progress"] > 0.15]

    wait_for("screening to be at the model", at_model, seconds=120)
    storescu(running.port, *study(tmp_path / "7", 7))

    def delivered():
        jobs = running.jobs()
        return [job for job in jobs if (job["model"], job["kind"], job["state"]) == ("quick", "deliver", "done")]

    [stroke] = wait_for("the stroke to be delivered", delivered, seconds=120)
    screening = [job for job in running.jobs() if (job["model"], job["kind"]) == ("slow", "infer")]
    assert {job["state"] for job in screening} <= {"queued", "running"}
    assert sum(job["yielded"] for job in screening) == 1

    jobs = running.wait_until_idle(jobs=6)
    assert {job["state"] for job in jobs} == {"done"}
    assert all(job["attempts"] == 1 for job in jobs)
    delivered_studies = [str(dcmread(BytesIO(content)).StudyInstanceUID) for content in orthanc.files_of("SEG")]
    assert len(delivered_studies) == len(set(delivered_studies)) == 3
    assert stroke["study_instance_uid"] in delivered_studies
