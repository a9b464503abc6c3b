"""A model in a process of its own can do what it is for, and nothing else; the worker outlives whatever it does."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from dicom_node.errors import ModelRefused, NotApplicable
from dicom_node.findings import Reason
from dicom_node.manifest import parse
from tests import hostile
from workers import syscalls
from workers.bundle import Bundles
from workers.containment import Walls, walls
from workers.passing import read_grid, read_prediction, write_grid, write_prediction
from workers.prediction import Detection, Grid, Prediction
from workers.scratch import sweep

pytestmark = pytest.mark.skipif(bool(walls().missing), reason=f"this kernel lacks {walls().missing}")

MANIFEST = """
schema = 1
name = "{name}"
version = "1.0.0"
title = "{name}"
manufacturer = "A hospital"
licence = "MIT"
intended_use = "tests"
runtime = "python"
trusted = true
parameters = {{ entry_point = "{package}:model" }}
limits = {{ memory_megabytes = {memory}, seconds = {seconds} }}
[inputs.ct]
modality = ["CT"]
[outputs.segments.3]
label = "Lung"
category = {{ value = "123037004", scheme = "SCT", meaning = "Anatomical Structure" }}
type = {{ value = "39607008", scheme = "SCT", meaning = "Lung" }}
colour = [240, 230, 140]
[outputs.maps.likely]
label = "Likely"
[outputs.detections.mass]
label = "Mass"
category = {{ value = "49755003", scheme = "SCT", meaning = "Morphologically Abnormal Structure" }}
finding = {{ value = "4147007", scheme = "SCT", meaning = "Mass" }}
colour = [250, 200, 40]
"""


def manifest_text(name="model", package="nowhere", memory=2048, seconds=60):
    return MANIFEST.format(name=name, package=package, memory=memory, seconds=seconds)


def made_grid(**changes):
    values = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    grid = Grid(
        values=values,
        spacing=(3.0, 2.0, 1.0),
        stack=0,
        positions=np.array([0.0, 3.0, 6.0, 9.5]),
        thickness=np.array([3.0, 3.0, 3.25, 3.5]),
        directions=np.eye(3)[::-1].copy(),
        origins=np.arange(12.0).reshape(4, 3),
        modality="CT",
    )
    return replace(grid, **changes)


@pytest.fixture
def bundles():
    made = Bundles(device="cpu")
    yield made
    made.close()


@pytest.fixture
def write_model(tmp_path, monkeypatch):
    """Return a function that writes an installed package with `model(grid)`, and the folder that names it."""
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))

    def write(body, name="model", **limits):
        package = f"package_of_{name}"
        (tmp_path / "packages" / package).mkdir(parents=True)
        (tmp_path / "packages" / package / "__init__.py").write_text(textwrap.dedent(body))
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.toml").write_text(manifest_text(name, package, **limits))
        return tmp_path / name

    return write


def nothing(part):
    """A progress that nobody watches."""


ANSWER = """
import numpy as np
from workers.prediction import Detection, Prediction
def model(grid, progress):
    progress(0.5)
    box = ((1, 3), (0, 5), (2, 4))
    found = Detection("mass", box, (1.5, 2.0, 2.5), 0.75, value=7, laterality="left", measurements={"volume": 12.5})
    return Prediction(
        labels=np.where(grid.values > 60, 3, 0).astype(np.uint8),
        overlapping=(np.where(grid.values > 90, 3, 0).astype(np.uint8),),
        instances=(grid.values % 7).astype(np.uint16),
        maps={"likely": (grid.values / 120).astype(np.float32)},
        detections=(found,),
        parameters={"seed": "0"},
        incomplete=("below",),
        certainty={3: 0.9},
    )
"""


# -- what it is for -----------------------------------------------------------------------------------------------


def test_a_contained_model_says_what_it_would_say_in_the_worker(write_model, bundles):
    scope = {}
    exec(ANSWER, scope)
    wanted = scope["model"](made_grid(), nothing)
    seen = []

    answer = bundles.get(write_model(ANSWER)).model(made_grid(), seen.append)

    for name in ("labels", "instances"):
        assert np.array_equal(getattr(answer, name), getattr(wanted, name))
    assert np.array_equal(answer.overlapping[0], wanted.overlapping[0])
    assert np.array_equal(answer.maps["likely"], wanted.maps["likely"])
    assert answer.detections == wanted.detections
    assert (answer.parameters, answer.incomplete) == (wanted.parameters, wanted.incomplete)
    assert answer.certainty == wanted.certainty
    assert 0.5 in seen


def test_it_has_as_many_threads_as_the_worker_would_have(write_model, bundles):
    """OpenMP asks for an affinity before it counts processors, and takes one of them where it may not."""
    bundle = bundles.get(
        write_model("""
        import numpy as np
        import torch
        from workers.prediction import Prediction
        def model(grid):
            threads = {"threads": str(torch.get_num_threads())}
            return Prediction(labels=np.zeros(grid.values.shape, np.uint8), parameters=threads)
        """)
    )

    answer = bundle.model(made_grid(), nothing)

    alone = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    wanted = subprocess.run(alone, capture_output=True, text=True, check=True).stdout.strip()
    assert answer.parameters["threads"] == wanted


def test_it_stays_between_two_predictions(write_model, bundles):
    bundle = bundles.get(write_model(ANSWER))
    bundle.model(made_grid(), nothing)
    first = bundle.model.pid

    bundle.model(made_grid(), nothing)

    assert bundle.model.pid == first


@pytest.mark.parametrize(
    "grid",
    [
        made_grid(),
        made_grid(values=np.zeros((4, 5, 6, 3), np.float32), placed=False),
        made_grid(others={"flair": np.full((4, 5, 6), 2.5, np.float32)}),
    ],
    ids=["volume", "colour", "two series"],
)
def test_a_grid_arrives_as_it_was_sent(tmp_path, grid):
    arrived = read_grid(json.loads(json.dumps(write_grid(grid, tmp_path))), tmp_path)

    for name in ("values", "positions", "thickness", "directions", "origins"):
        assert np.array_equal(getattr(arrived, name), getattr(grid, name))
        assert getattr(arrived, name).dtype == getattr(grid, name).dtype
    assert (arrived.spacing, arrived.stack, arrived.placed) == (grid.spacing, grid.stack, grid.placed)
    assert arrived.modality == grid.modality
    assert arrived.others.keys() == grid.others.keys()
    assert all(np.array_equal(arrived.others[name], grid.others[name]) for name in grid.others)


def test_what_it_was_not_made_for_arrives_as_an_answer_and_it_lives_on(write_model, bundles):
    bundle = bundles.get(
        write_model("""
        from dicom_node.errors import NotApplicable
        from dicom_node.findings import Reason
        def model(grid):
            raise NotApplicable(Reason.ORGAN_NOT_FOUND, "no lung")
        """)
    )
    first = bundle.model.pid

    with pytest.raises(NotApplicable) as answer:
        bundle.model(made_grid(), nothing)

    assert (answer.value.reason, answer.value.detail) == (Reason.ORGAN_NOT_FOUND, "no lung")
    assert bundle.model.pid == first


def test_a_defect_of_a_model_is_told_by_type_and_place_and_never_by_its_message(write_model, bundles):
    bundle = bundles.get(write_model("def model(grid):\n    print('DOE^JOHN')\n    raise ValueError('DOE^JOHN')\n"))

    with capture_logs() as logs, pytest.raises(ModelRefused, match="failed with ValueError") as refused:
        bundle.model(made_grid(), nothing)

    assert "DOE" not in str(refused.value) + json.dumps(logs)
    assert any("package_of_model/__init__.py:3" in place for place in logs[0]["places"])


def test_an_entry_point_that_is_not_there_is_refused_by_name(write_model, bundles):
    with pytest.raises(ModelRefused, match="package_of_model:model cannot be imported"):
        bundles.get(write_model("def other(grid): ..."))


# -- what it may not do -------------------------------------------------------------------------------------------


def test_the_attempts_succeed_where_nothing_contains_them(tmp_path, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "secret")
    with hostile.place(tmp_path) as place:
        done = subprocess.run(
            [sys.executable, "-c", place.source(severe=False), "1"], capture_output=True, text=True, check=True
        )

        assert set(json.loads(done.stdout)["message"].split()[1:]) == hostile.NAMES
        assert not place.is_untouched()


def test_a_contained_model_does_none_of_it(tmp_path, write_model, bundles, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "secret")
    with hostile.place(tmp_path) as place:
        folder = write_model(f"def model(grid):\n    exec({place.source(severe=True)!r}, {{}})\n")

        with pytest.raises(ModelRefused) as refused:
            bundles.get(folder).model(made_grid(), nothing)

        assert set(str(refused.value).split("succeeded: ")[1].split()) == hostile.ALLOWED
        assert place.is_untouched()


def test_it_reads_what_it_is_asked_about_and_not_what_it_will_be_asked_about(write_model, bundles):
    folder = write_model("""
        import os
        from workers.prediction import Prediction
        def model(grid):
            scratch = os.path.dirname(os.environ["HOME"])
            read = [place for place in ("given", "aside/0", "aside/1") if _is_read(f"{scratch}/{place}/values.npy")]
            return Prediction(parameters={"read": " ".join(read), "largest": str(grid.values.max())})
        def _is_read(path):
            try:
                open(path, "rb").close()
                return True
            except OSError:
                return False
        """)
    model = bundles.get(folder).model
    first, second = made_grid(), made_grid(values=np.full((4, 5, 6), 9, np.int16))
    for grid in (first, second):
        model.prepare(grid)
    assert len(list(model._child._scratch.glob("aside/1/values.npy"))) == 1

    answers = [model(grid, nothing).parameters for grid in (first, second)]

    assert answers == [{"read": "given", "largest": "119"}, {"read": "given", "largest": "9"}]


def test_a_model_that_has_ended_prepares_for_nothing_and_leaves_nothing(write_model, bundles):
    model = bundles.get(write_model(ANSWER)).model
    scratch, grid = model._child._scratch, made_grid()
    model.prepare(grid)
    child = model._child
    model.end()

    model.prepare(grid)
    child.prepare(made_grid())

    assert not scratch.exists()
    assert np.array_equal(model(grid, nothing).labels > 0, grid.values > 60)


def test_it_sees_no_descriptor_and_no_variable_of_the_worker(tmp_path, write_model, bundles, monkeypatch):
    monkeypatch.setenv("DICOM_NODE_BROKER", "redis://:secret@queue:6379/0")
    folder = write_model("""
        import os
        from dicom_node.errors import ModelRefused
        def model(grid):
            kinds = sorted({os.readlink("/proc/self/fd/%s" % n).split(":")[0].split("/")[-1] for n in _open()})
            raise ModelRefused(" ".join([*kinds, "|", *sorted(os.environ)]))
        def _open():
            return [n for n in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + n)]
        """)
    held = (tmp_path / "held").open("w")
    os.set_inheritable(held.fileno(), True)

    with held, pytest.raises(ModelRefused) as refused:
        bundles.get(folder).model(made_grid(), nothing)

    kinds, names = str(refused.value).removeprefix("model: ").split(" | ")
    given = {f"{name}.npy" for name in ("values", "positions", "thickness", "directions", "origins")}  # it maps them
    assert set(kinds.split()) - given <= {"pipe", "null", "fd", "anon_inode"}
    assert "DICOM_NODE_BROKER" not in names
    assert "HOME" in names


@pytest.mark.parametrize(
    ("body", "limits", "said"),
    [
        ("held = []\n    while True: held.append(b'x' * (1 << 24))", {"memory": 700}, "limits.memory_megabytes = 700"),
        ("held = bytearray(1 << 42)", {"memory": 700}, "limits.memory_megabytes = 700"),
        (
            "import os\n    n = 0\n    while True:\n        n += 1\n"
            "        open(f'{os.environ[\"TMPDIR\"]}/{n}', 'wb').write(b'x' * (1 << 24))",
            {"memory": 700},
            "limits.memory_megabytes = 700",
        ),
        ("while True: pass", {"seconds": 10}, "limits.seconds = 10"),
        ("import os, signal\n    os.kill(os.getpid(), signal.SIGSTOP)", {"seconds": 10}, "limits.seconds = 10"),
        ("import ctypes\n    ctypes.string_at(0)", {}, "died .signal 11"),
        ("import os\n    os._exit(3)", {}, "died .status 3"),
        (
            "import os, sys\n    os.write(int(sys.argv[1]), b'no json\\n')\n    import time; time.sleep(9)",
            {},
            "protocol",
        ),
        ("import os, sys\n    while True: os.write(int(sys.argv[1]), b'x' * 65536)", {}, "protocol"),
        ('import os, sys\n    os.write(int(sys.argv[1]), b\'{"said": "answer"}\\n\')', {}, "cannot be read"),
        (
            'import os, sys\n    os.write(int(sys.argv[1]), b\'{"said": "failed", "error": 3, "places": 5}\\n\')',
            {},
            "failed with an error",
        ),
        ("import os, sys\n    os.write(int(sys.argv[1]), b'[' * 9999 + b'\\n')", {}, "protocol"),
        ("return 3", {}, "no Prediction"),
    ],
    ids=[
        "memory",
        "one block",
        "files",
        "loop",
        "stopped",
        "crash",
        "exit",
        "noise",
        "flood",
        "forged",
        "odd",
        "deep",
        "no answer",
    ],
)
def test_the_worker_lives_and_says_why_the_model_does_not(write_model, bundles, body, limits, said):
    folder = write_model(f"def model(grid):\n    {body}\n", **limits)
    bundle = bundles.get(folder)

    with pytest.raises(ModelRefused, match=said):
        bundle.model(made_grid(), nothing)

    assert bundle.model.pid is None
    assert bundles.get(write_model(ANSWER, "sound")).model(made_grid(), nothing).labels is not None


def test_a_model_that_is_not_wanted_any_more_is_ended_while_it_works(write_model, bundles):
    bundle = bundles.get(write_model("def model(grid):\n    while True: pass\n"))
    pid = bundle.model.pid

    class Cancelled(Exception):
        pass

    def cancel(part):
        raise Cancelled

    started = time.monotonic()
    with pytest.raises(Cancelled):
        bundle.model(made_grid(), cancel)

    assert time.monotonic() - started < 20  # its own limit is 60
    assert not Path(f"/proc/{pid}").exists()


def test_it_leaves_no_file_behind(tmp_path, write_model, bundles, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    bundle = bundles.get(write_model(ANSWER))
    bundle.model(made_grid(), nothing)
    assert len(list((tmp_path / "scratch").iterdir())) == 1

    bundles.close()

    assert list((tmp_path / "scratch").iterdir()) == []


WORKER = """
import sys, time
from pathlib import Path
import numpy as np
from dicom_node import log
from workers.bundle import Bundles
log.configure()
bundles = Bundles(device="cpu")
print(bundles.get(Path(sys.argv[1])).model.pid, flush=True)
time.sleep(60)
"""


def test_it_dies_with_the_worker_whose_leavings_the_next_one_removes(tmp_path, write_model, monkeypatch):
    folder = write_model(ANSWER)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"TMPDIR": str(scratch), "PYTHONPATH": f"{root}:{tmp_path / 'packages'}"}
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    pid = int(worker.stdout.readline())
    assert Path(f"/proc/{pid}").exists()

    worker.send_signal(signal.SIGKILL)
    worker.communicate()

    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    sweep()
    [left] = scratch.iterdir()  # it is fresh: somebody may be making it
    os.utime(left, (1, 1))
    sweep()
    assert list(scratch.iterdir()) == []


# -- a machine that cannot contain --------------------------------------------------------------------------------


def test_without_walls_what_can_run_code_is_refused_and_says_what_is_missing(write_model):
    bundles = Bundles(device="cpu", found=Walls(0, seccomp=False))

    with pytest.raises(ModelRefused, match=r"lacks Landlock .* and seccomp"):
        bundles.get(write_model(ANSWER))


def test_the_refused_system_calls_have_the_numbers_of_the_kernel():
    header = Path("/usr/include/asm-generic/unistd.h")
    if not header.is_file():
        pytest.skip("no kernel headers")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text())
    numbers = {name: int(number) for name, number in found} | {"fchmodat2": 452}

    looked_at = dict(syscalls.table("aarch64"))

    assert len(looked_at) > 90
    assert {name: numbers[name] for name in looked_at} == looked_at


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_filter_ends_with_a_permission_and_jumps_nowhere_outside(machine):
    program = syscalls.program(4711, machine)
    lines = [program[start : start + 8] for start in range(0, len(program), 8)]

    assert len(lines) < 4096
    assert lines[-1] == bytes([6, 0, 0, 0, 0, 0, 0xFF, 0x7F])
    for place, line in enumerate(lines):
        if line[0] in (0x15, 0x35, 0x45):
            assert place + 1 + max(line[2], line[3]) < len(lines)


# -- several models -----------------------------------------------------------------------------------------------


def test_the_model_that_was_used_longest_ago_makes_room(write_model):
    bundles = Bundles(device="cpu", budget=1)
    first, second = write_model(ANSWER, "first"), write_model(ANSWER, "second")
    one = bundles.get(first)
    old = one.model.pid

    two = bundles.get(second)

    assert one.model.pid is None
    assert not Path(f"/proc/{old}").exists()
    assert one.model(made_grid(), nothing).labels is not None  # and comes back when it is needed
    assert two.model.pid is not None
    bundles.close()
    assert two.model.pid is None


def test_bundles_that_nobody_closes_leave_nothing(tmp_path, write_model, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    bundles = Bundles(device="cpu")
    pid = bundles.get(write_model(ANSWER)).model.pid

    del bundles
    gc.collect()

    assert not Path(f"/proc/{pid}").exists()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_models_that_fit_stay(write_model):
    bundles = Bundles(device="cpu", budget=4096)
    one = bundles.get(write_model(ANSWER, "first"))
    first = one.model.pid

    bundles.get(write_model(ANSWER, "second"))

    assert one.model.pid == first is not None
    bundles.close()


# -- nothing that comes back is believed --------------------------------------------------------------------------

GRID = made_grid()
SOUND = Prediction(labels=np.zeros(GRID.shape, np.uint8))


def message(**changes):
    return {
        "labels": True,
        "instances": False,
        "layers": 0,
        "maps": [],
        "detections": [],
        "parameters": {},
        "incomplete": [],
        "certainty": [],
        "classes": {},
    } | changes


def detection(**changes):
    found = Detection("mass", ((0, 1), (0, 1), (0, 1)), (0.0, 0.0, 0.0), 0.5)
    return write_prediction(Prediction(detections=(found,)), Path())["detections"][0] | changes


@pytest.mark.parametrize(
    "said",
    [
        message(labels=True, layers=1),
        message(layers=10**9),
        message(layers="1"),
        message(maps=["likely"]),
        message(maps=["../../secret"]),
        message(maps=["unknown"]),
        message(maps=7),
        message(detections=[detection(name="unknown")]),
        message(detections=[detection(box=[[0, 5], [0, 1], [0, 1]])]),
        message(detections=[detection(box=[[0, 1], [0, 1]])]),
        message(detections=[detection(box=[[0.5, 1], [0, 1], [0, 1]])]),
        message(detections=[detection(confidence=float("nan"))]),
        message(detections=[detection(confidence=None)]),
        message(detections=[detection(centre=[float("inf"), 0, 0])]),
        message(detections=[detection(laterality="both")]),
        message(detections=[detection(measurements={"volume": "large"})]),
        message(detections=[{}]),
        message(detections=[3]),
        message(detections=[detection()] * 10_001),
        message(parameters={"a": "line\nbreak"}),
        message(parameters={"a": "x" * 1000}),
        message(incomplete=["x"] * 100),
        message(certainty=[[9, 0.5]]),
        message(classes={"unknown": [0, 0.5]}),
        {},
    ],
)
def test_an_answer_that_is_none_is_refused(tmp_path, said):
    np.save(tmp_path / "labels.npy", SOUND.labels)
    np.save(tmp_path / "map-unknown.npy", np.zeros(GRID.shape, np.float32))

    with pytest.raises(ModelRefused, match="cannot be read"):
        read_prediction(said, tmp_path, GRID, parse(manifest_text()))


def arrays(path):
    np.save(path / "wrong shape", np.zeros((4, 5, 7), np.uint8))
    np.save(path / "wrong type", np.zeros(GRID.shape, np.float64))
    np.save(path / "fortran", np.asfortranarray(np.zeros(GRID.shape, np.uint8)))
    np.save(path / "objects", np.array([{}], dtype=object), allow_pickle=True)
    (path / "nothing.npy").write_bytes(b"")
    (path / "short.npy").write_bytes((path / "fortran.npy").read_bytes()[:200])
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999,), }"
    (path / "vast.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    (path / "code.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00__import__('os')")
    (path / "link.npy").symlink_to("/etc/hostname")
    os.mkfifo(path / "pipe.npy")
    (path / "folder.npy").mkdir()


@pytest.mark.parametrize(
    "kind",
    [
        "wrong shape",
        "wrong type",
        "fortran",
        "objects",
        "nothing",
        "short",
        "vast",
        "code",
        "link",
        "pipe",
        "folder",
        "absent",
    ],
)
def test_a_file_that_is_no_such_array_is_refused(tmp_path, kind):
    arrays(tmp_path)
    if kind != "absent":
        (tmp_path / f"{kind}.npy").rename(tmp_path / "labels.npy")

    with pytest.raises(ModelRefused, match="cannot be read"):
        read_prediction(message(), tmp_path, GRID, parse(manifest_text()))


def test_a_map_that_is_not_finite_is_refused(tmp_path):
    values = np.zeros(GRID.shape, np.float32)
    values[0, 0, 0] = np.nan
    np.save(tmp_path / "map-likely.npy", values)

    with pytest.raises(ModelRefused, match="cannot be read"):
        read_prediction(message(labels=False, maps=["likely"]), tmp_path, GRID, parse(manifest_text()))
