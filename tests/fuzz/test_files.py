"""Files that lie: everything that reads files reads them or refuses them, and makes no room for what they claim."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.fuzz.files import crafted, cuts, real, tampered

MAY_TAKE = 420  # MB more at the peak: 400,000 items as objects
MAY_LAST = 25.0  # seconds for the same, on a machine with other things to do


@pytest.fixture
def read(tmp_path):
    """Has files read in a process of its own; returns what that says of them."""

    def run(files: dict[str, bytes], *, seconds: float = 200) -> list[dict[str, object]]:
        paths = []
        for name, content in files.items():
            paths.append(tmp_path / name)
            paths[-1].write_bytes(content)
        command = [sys.executable, "-m", "tests.fuzz.reading", *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT, env=_environment())
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert done.returncode == 0, (done.returncode, done.stderr[-2000:], lines[-1:])
        return lines

    return run


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def bad(lines: list[dict[str, object]]) -> list[dict[str, object]]:
    return [
        line
        for line in lines
        if str(line["said"]).startswith("DEFECT")
        or float(str(line["seconds"])) > MAY_LAST
        or int(str(line["megabytes"])) > MAY_TAKE
    ]


def test_files_that_claim_nest_or_deflate_too_much_are_refused_and_cost_little(read):
    lines = read(dict(crafted()))

    assert bad(lines) == []
    said = {(line["file"], line["by"]): line["said"] for line in lines}
    for name in ("items", "items-deflated", "items-of-known-length", "bomb-400"):
        assert said[name, "header"] == "Excessive", name
    for name in ("65535-square", "frames-2-31", "rle-garbage-65535", "j2k-frames"):
        assert said[name, "source"] == said[name, "frames"] == "InputRefused", name


def test_real_files_that_were_tampered_with_are_read_or_refused(read):
    chance = random.Random(3)
    files = {f"{number}-{name}": tampered(content, chance) for number in range(6) for name, content in real().items()}

    lines = read(files)

    assert bad(lines) == []
    assert {"read", "InputRefused"} <= {str(line["said"]) for line in lines}


def test_a_file_cut_off_anywhere_is_read_or_refused(read):
    lines = read({f"{number}": cut for number, cut in enumerate(cuts(real()["MR_small_RLE.dcm"]))})

    assert bad(lines) == []


@pytest.mark.parametrize("syntax", ["JPEG2000Lossless", "JPEGLSLossless", "JPEGLosslessSV1"])
def test_damaged_frames_end_no_decoder(syntax):
    command = [sys.executable, "-m", "tests.fuzz.frames", syntax, "2000"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=ROOT, env=_environment())

    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    decoded, _, not_decoded, *_ = done.stdout.split()
    assert int(decoded) > 100
    assert int(not_decoded) > 100


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_tampering_for_a_long_time(read, tmp_path):
    seed, until = int(time.time()), time.monotonic() + 900
    while time.monotonic() < until:
        chance = random.Random(seed)
        lines = read(
            {
                f"{seed}-{number}-{name}": tampered(content, chance)
                for number in range(20)
                for name, content in real().items()
            }
        )
        assert bad(lines) == [], seed
        seed += 1


def test_real_files_are_read_as_ever(read):
    """Rations are for what no image is; what comes deflated is decoded as well."""
    lines = read({name: content for name, content in real().items() if name != "nested_priv_SQ.dcm"})

    assert {line["said"] for line in lines if line["by"] not in ("volume",)} == {"read"}
