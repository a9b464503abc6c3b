"""The README's first command, as a newcomer runs it."""

from __future__ import annotations

import os
import subprocess
import sys

from PIL import Image

from dicom_node.demo.phantom import make_thorax, write_series
from dicom_node.demo.show import missing


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dicom_node", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, "COLUMNS": "160"})


def test_the_demo_shows_what_came_back(tmp_path):
    done = demo("--output", str(tmp_path / "out"))

    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("Right lung", "Left lung", "Nodule 1", "Nodule 3", "56 slices without a gap"):
        assert expected in done.stdout
    assert len(list((tmp_path / "out" / "pacs").glob("*.dcm"))) == 4
    with Image.open(tmp_path / "out" / "key-slices.png") as picture:
        colours = picture.getcolors(10_000_000)
    coloured = sum(count for count, (r, g, b) in colours if max(r, g, b) - min(r, g, b) > 40)
    assert coloured > 20_000


def test_the_demo_fails_where_no_model_applies(tmp_path):
    write_series(make_thorax(slices=6), tmp_path / "ct")

    done = demo(str(tmp_path / "ct"), "--output", str(tmp_path / "out"))

    assert done.returncode == 1
    assert "too_few_slices" in done.stdout


def test_the_demo_empties_no_folder_that_is_not_its_own(tmp_path):
    precious = tmp_path / "thesis.txt"
    precious.write_text("five years")

    done = demo("--output", str(tmp_path))

    assert done.returncode == 2
    assert "--output" in done.stderr
    assert precious.read_text() == "five years"


def test_a_model_without_a_result_and_a_result_that_was_lost_are_missed():
    done = {"job_id": 1, "kind": "infer", "model": "ct_lung", "state": "done", "reason": None}
    broken = {**done, "job_id": 2, "model": "ct_lung_nodule", "state": "failed", "reason": "defect"}
    result = {"model": "ct_lung", "kind": "seg", "form": "", "sop_instance_uid": "1.2.3"}

    assert missing([done], [result], {"1.2.3"}) == []
    assert missing([done], [result], set()) == ["a seg of ct_lung did not come back"]
    assert missing([done, broken], [result], {"1.2.3"}) == [
        "job 2 (infer ct_lung_nodule) is failed: defect",
        "ct_lung_nodule has no result",
    ]
    assert missing([done], [result, {**result, "form": "NONE", "sop_instance_uid": "1.2.4"}], {"1.2.3"}) == []
    assert missing([], [], set()) == ["no model ran"]
