"""What C does is what Python does, and where C gives up Python goes on: both read the same bytes."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicom_node import native
from dicom_node.elements import PIXEL_DATA, NotUnderstood, scan
from dicom_node.landing import memory
from dicom_node.sockets import limit_waits
from tests.datasets import EXPLICIT, IMPLICIT, ct, encoded
from tests.unit.test_elements import ALL, PYDICOMS_FILES, nested, places

WANTED = frozenset([*ALL, 0x00080016, 0x00080018, 0x0020000D, 0x7FE00008])
BEGINNINGS = [
    (encoded(nested(depth, wide), syntax), syntax == IMPLICIT)
    for syntax in (IMPLICIT, EXPLICIT)
    for depth, wide in ((0, True), (2, True), (2, False), (70, True))
]

if not native.is_there:
    pytest.skip("installed without a C compiler", allow_module_level=True)


def python(view, is_implicit, wanted, stop_at, is_whole):
    """Return what Python finds; None where it finds that something is wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", None)
        try:
            return scan(view, is_implicit, wanted, stop_at, is_whole=is_whole)
        except NotUnderstood:
            return None


def c(view, is_implicit, wanted, stop_at, is_whole):
    """Return what C finds; None where it gives up."""
    found = native.Wanted(wanted).scan(view, is_implicit, stop_at, is_whole=is_whole)
    return None if found is None else dict(found)


def test_c_finds_what_python_finds_in_all_files_of_pydicom():
    compared = given_up = 0
    for path in PYDICOMS_FILES:
        if (known := places(path)) is None:
            continue
        data, is_implicit, _ = known
        for stop_at, is_whole in ((PIXEL_DATA, True), (1 << 32, True), (0x7FE00000, False)):
            expected = python(data, is_implicit, WANTED, stop_at, is_whole)
            found = c(data, is_implicit, WANTED, stop_at, is_whole)
            compared += 1
            given_up += found is None and expected is not None
            assert found is None or found == expected, path.name
    assert compared >= 180
    assert given_up == 0


@settings(max_examples=400, deadline=None)
@given(
    which=st.sampled_from(BEGINNINGS),
    changes=st.lists(
        st.tuples(st.integers(0, 1 << 12), st.sampled_from([0, 1, 0x7F, 0xFE, 0xFF, 0x53, 0x51])), max_size=6
    ),
    cut=st.integers(0, 1 << 12),
    stop_at=st.sampled_from([PIXEL_DATA, 0x7FE00000, 1 << 32]),
    is_whole=st.booleans(),
    other=st.booleans(),
)
def test_whatever_the_bytes_c_finds_the_same_or_gives_up(which, changes, cut, stop_at, is_whole, other):
    data, is_implicit = bytearray(which[0]), which[1] != other
    for at, value in changes:
        data[at % len(data)] = value
    view = data[: max(0, len(data) - cut)]

    found = c(view, is_implicit, WANTED, stop_at, is_whole)

    assert found is None or found == python(view, is_implicit, WANTED, stop_at, is_whole)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_noise_is_given_up_or_read_as_python_reads_it(noise, is_implicit):
    found = c(noise, is_implicit, WANTED, PIXEL_DATA, True)

    assert found is None or found == python(noise, is_implicit, WANTED, PIXEL_DATA, True)


def test_bytes_that_may_not_be_written_to_are_read_where_they_lie():
    data = encoded(ct(7), EXPLICIT)

    assert c(memoryview(data), False, ALL, PIXEL_DATA, True) == python(data, False, ALL, PIXEL_DATA, True)


def test_without_the_library_the_package_is_the_same():
    """The switch that whoever mistrusts C would use; ARCHITECTURE.md has it."""
    program = "from dicom_node import native; print(native.is_there)"
    environment = {**os.environ, "DICOM_NODE_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)

    assert done.stdout == "False\n"


@pytest.mark.parametrize(("compiler", "reason"), [("/nonexistent/cc", "cannot be run"), ("false", "failed")])
def test_a_compiler_that_does_not_work_is_said_and_leaves_no_library(tmp_path, compiler, reason):
    folder = tmp_path / "native"
    folder.mkdir()
    for name in ("build.py", "receive.c", "scan.c"):
        (folder / name).write_bytes(Path(native.__file__).with_name(name).read_bytes())
    (folder / "library.so").write_bytes(b"of an earlier version")

    done = subprocess.run(
        [sys.executable, folder / "build.py"], env={**os.environ, "CC": compiler}, capture_output=True, text=True
    )

    assert done.returncode == 1
    assert reason in done.stderr
    assert not list(folder.glob("library*"))


@pytest.fixture
def landed(tmp_path):
    """Land a file, and tell somebody."""

    def land(reply: native.Reply, *, deleted: bool = False) -> bool:
        path, content = tmp_path / "file", memory()[:5000]
        content[:] = bytes(range(250)) * 20
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if deleted:
            path.unlink()
        try:
            done = native.land(descriptor, content, reply)
        except OSError:
            os.close(descriptor)
            raise
        assert path.read_bytes() == bytes(content)
        return done

    return land


def test_who_waits_is_told_as_soon_as_it_is_durable(landed):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reply = native.Reply(ours, b"kept")

        assert landed(reply)

        assert reply.is_sent
        assert theirs.recv(100) == b"kept"


def test_nobody_is_told_of_what_nobody_would_find(landed):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reply = native.Reply(ours, b"kept")

        with pytest.raises(OSError, match="Stale"):
            landed(reply, deleted=True)

        assert not reply.is_sent
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(100)


def test_what_is_durable_stays_so_where_nobody_can_be_told(landed):
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours:
        reply = native.Reply(ours, b"kept")

        assert landed(reply)

        assert not reply.is_sent


def test_names_are_given_and_taken_in_order_up_to_the_first_that_fails(tmp_path):
    names = [str(tmp_path / name) for name in ("one", "zwei ü", "3", "4")]
    descriptors = native.create(names, 0o640)
    assert [os.readlink(f"/proc/self/fd/{each}") for each in descriptors] == names
    for each in descriptors:
        assert not os.get_inheritable(each)
        os.close(each)

    (new,) = native.create([str(tmp_path / "new"), names[1], str(tmp_path / "never")], 0o640)
    os.close(new)
    assert not (tmp_path / "never").exists()

    places = [(name, f"{name}.dcm") for name in names]
    Path(places[2][1]).touch()
    assert native.link(places) == 2
    assert os.path.samefile(*places[1])
    assert not Path(places[3][1]).exists()

    os.unlink(names[1])
    assert native.unlink(names) == 1
    assert [Path(name).exists() for name in names] == [False, False, True, True]
    assert native.link([]) == native.unlink([]) == len(native.create([], 0o640)) == 0


def test_without_c_no_name_is_given_or_taken(tmp_path, in_python):
    one = str(tmp_path / "one")
    Path(one).touch()
    assert (native.create([one], 0o640), native.link([(one, f"{one}.dcm")]), native.unlink([one])) == ([], 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 1000), max_size=8), sizes=st.lists(st.integers(0, 150), min_size=1, max_size=12))
def test_a_data_set_goes_on_where_the_kernel_would_not_wait_any_more(cuts, sizes):
    values = [bytes([number % 256]) * size for number, size in enumerate(sizes)]
    pdus = [
        struct.pack(">BxLLBB", 4, size + 6, size + 2, 1, 2 * (at == len(sizes) - 1)) + value
        for at, (size, value) in enumerate(zip(sizes, values, strict=True))
    ]
    stream, room, filled, reasons = b"".join(pdus), memory(), 0, []
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor() as pool:
        limit_waits(ours, 0.01)

        def send() -> None:
            for a, b in itertools.pairwise(edges):
                theirs.sendall(stream[a:b])
                time.sleep(0.03)

        sent = pool.submit(send)
        flow = native.Flow(ours, longest_pdu=1 << 16, timeout=5.0, ahead=memoryview(bytearray(100)))
        flow.begin_data_set(1, 0, time.monotonic() + 5.0)
        while not reasons or reasons[-1] == native.PROGRESS:
            reason, filled = flow.fragments(room, filled)
            reasons.append(reason)
        sent.result()

    assert reasons[-1] == native.WHOLE
    assert bytes(room[:filled]) == b"".join(values)
    assert flow.in_pdu == 0
