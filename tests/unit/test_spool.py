from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from dicom_node.entities import Header
from dicom_node.errors import SettingsError, SpoolFull, Unavailable
from dicom_node.landing import pour
from dicom_node.part10 import preamble
from dicom_node.spool import Spool


def header(number: int = 1, study: str = "1.2", series: str = "1.2.3") -> Header:
    return Header("1.2.840.10008.5.1.4.1.1.2", f"1.2.3.{number}", study, series, "CT", 1, None, None, False)


def settle(spool: Spool, one: Header, content: bytes = b"x") -> str:
    """Let a file arrive, and give it its place."""
    file = arriving(spool, content, lead=0)
    try:
        file.keep(b"")
        path = spool.place_of(one)
        spool.settle([(file.path, path)])
    finally:
        file.close()
    spool.sync([path])
    return path


def test_the_bytes_lie_where_the_path_says(spool):
    path = settle(spool, header(), b"content")

    assert path == "studies/1.2/1.2.3/1.2.3.1.dcm"
    assert spool.absolute(path).read_bytes() == b"content"


def test_a_result_is_synced_before_it_gets_its_name_and_the_folder_after(spool, monkeypatch):
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        calls.append("fsync " + os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(str(spool.storage)))
        fsync(descriptor)

    def noted_replace(source, target):
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)

    spool.keep_result("1.2.34", b"x")

    assert calls[0].startswith("fsync /incoming/")
    assert calls[-2:] == ["rename", "fsync /results/34"]
    assert {"fsync ", "fsync /results"} <= set(calls[1:-2]), "every new folder is durable as well"


HEAD = preamble("1.2.840.10008.5.1.4.1.1.2", "1.2.3", "1.2.840.10008.1.2.1", "SCANNER")


def arriving(spool, content: bytes, *, lead: int = len(HEAD)):
    """Return a file with `content` after the place of its head."""
    file = spool.inbox.open(lead=lead)
    pour(memoryview(content), file)
    return file


def in_inbox(spool) -> list[bytes]:
    return sorted(path.read_bytes() for path in spool.inbox.folder.iterdir())


def test_a_file_that_arrives_waits_for_the_ledger_from_the_moment_that_it_is_whole_and_durable(
    spool, monkeypatch, in_python
):
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    file = arriving(spool, b"content")
    assert synced == [str(spool.inbox.folder)], "the name is durable before there is anything in the file"
    assert not spool.inbox.waiting()

    file.keep(HEAD)
    path = Path(file.path)

    file.close()
    assert path.read_bytes() == HEAD + b"content"
    assert synced[1:] == [str(path)]
    assert spool.inbox.waiting() == [path]


def test_names_are_made_durable_for_many_files_at_once(spool, monkeypatch, in_python):
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    for number in range(20):
        file = arriving(spool, bytes([number]))
        file.keep(HEAD)
        file.close()
    assert synced.count(str(spool.inbox.folder)) <= 2, "the second when few are left"
    assert len(spool.inbox.waiting()) == len(set(synced)) - 1 == 20


def test_a_file_that_is_not_kept_is_gone(spool):
    file = arriving(spool, b"half")
    file.close()

    assert set(in_inbox(spool)) == {b""}


def test_what_was_made_in_advance_is_gone_when_the_node_ends(spool):
    spool.own()
    arriving(spool, b"content").keep(HEAD)

    spool.disown()

    assert in_inbox(spool) == [HEAD + b"content"]


def test_what_a_killed_node_was_receiving_is_swept_at_the_next_start(spool):
    half, whole = arriving(spool, b"half" * 400_000), arriving(spool, b"whole")
    whole.keep(HEAD)
    path = Path(whole.path)

    again = Spool(spool.storage)

    assert again.sweep_incoming(older_than=1e-9) == 0, "while the node runs, what is being received stays"
    assert again.sweep_incoming() == 1
    assert in_inbox(spool) == [HEAD + b"whole"]
    assert again.inbox.waiting() == [path]
    half.close()


def test_what_an_earlier_version_acknowledged_still_waits(spool):
    earlier = spool.inbox.folder / "0123.dcm"
    earlier.write_bytes(b"whatever it holds")
    assert spool.inbox.waiting() == [earlier]
    assert Spool(spool.storage).sweep_incoming() == 0


def test_somebody_may_tidy_the_inbox_up(spool):
    arriving(spool, b"first").keep(HEAD)
    for path in spool.inbox.unfinished():
        path.unlink()

    arriving(spool, b"second").keep(HEAD)

    assert len(spool.inbox.waiting()) == 2


@pytest.mark.parametrize("refused", ["the tenth slot", "the sync"])
def test_a_disk_that_is_full_when_slots_are_made_is_left_as_it_was(spool, monkeypatch, in_python, refused):
    opened, synced, number = os.open, os.fsync, iter(range(100))

    def refusing(path, flags, *args, **kwargs):
        if flags & os.O_CREAT and refused == "the tenth slot" and next(number) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, flags, *args, **kwargs)

    def broken(descriptor):
        if refused == "the sync":
            raise OSError(errno.EIO, "Input/output error")
        synced(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing)
        patch.setattr(os, "fsync", broken)
        with pytest.raises(Unavailable):
            spool.inbox.open(lead=0)
        assert not in_inbox(spool)

    arriving(spool, b"content").keep(HEAD)
    assert len(spool.inbox.waiting()) == 1


def test_a_file_that_cannot_be_synced_is_gone(spool, monkeypatch, in_python):
    file = arriving(spool, b"content")

    def broken(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(Unavailable):
            file.keep(HEAD)
    file.close()
    assert set(in_inbox(spool)) == {b""}


def test_a_folder_that_another_thread_makes_this_moment_is_synced_nevertheless(spool, monkeypatch):
    (spool.storage / "studies" / "1.2" / "1.2.3").mkdir(parents=True)  # made, not synced yet
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])

    settle(spool, header())

    assert str(spool.storage / "studies" / "1.2") in synced


def test_nothing_is_let_in_below_the_watermark(tmp_path):
    spool = Spool(tmp_path, minimum_free=1 << 60)

    with pytest.raises(SpoolFull, match="watermark"):
        spool.require_room(1)


def test_a_result_may_use_the_room_below_the_watermark(tmp_path):
    spool = Spool(tmp_path, minimum_free=1 << 60)

    path, _ = spool.keep_result("1.2.3", b"content")

    assert spool.absolute(path).read_bytes() == b"content"


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]).returncode:
        pytest.skip("only root can mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_says_so_and_leaves_nothing_behind(tiny_disk):
    spool = Spool(tiny_disk)
    settle(spool, header(1), b"x" * 1000)

    with pytest.raises(SpoolFull, match="disk is full"):
        settle(spool, header(2), b"x" * 1_000_000)
    with pytest.raises(SpoolFull, match="disk is full"):
        spool.keep_result("1.2.9", b"x" * 1_000_000)

    assert not list((tiny_disk / "incoming").iterdir())
    assert [path.name for path in (tiny_disk / "studies").rglob("*.dcm")] == ["1.2.3.1.dcm"]
    settle(spool, header(3), b"y" * 1000)


def test_a_draft_lies_where_nobody_looks_until_it_is_kept(spool):
    with spool.draft([b"con", memoryview(b"tent")]) as draft:
        assert draft.path.read_bytes() == b"content"
        assert not list((spool.storage / "results").rglob("*.dcm"))
        path = spool.keep_draft("1.2.3", draft)

    assert spool.absolute(path).read_bytes() == b"content"
    assert (path, draft.sha256) == spool.keep_result("1.2.3", b"content")
    assert draft.size == 7
    assert not list((spool.storage / "incoming").iterdir())


@pytest.mark.parametrize("where", ["while it is made", "before it is kept"])
def test_a_draft_that_is_not_kept_leaves_nothing(spool, where):
    def broken():
        yield b"beginning"
        if where == "while it is made":
            raise ValueError(where)

    with pytest.raises(ValueError, match=where), spool.draft(broken()):
        raise ValueError(where)

    assert not list((spool.storage / "incoming").iterdir())
    assert not list((spool.storage / "results").rglob("*"))


def test_a_limit_on_file_size_is_a_full_disk_too(spool):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(SpoolFull):
            settle(spool, header(), b"x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert set(in_inbox(spool)) == {b""}


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES, errno.ESTALE])
def test_a_disk_that_errs_is_unavailable_not_a_defect(spool, monkeypatch, number):
    def broken(_descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", broken)

    with pytest.raises(Unavailable):
        settle(spool, header())

    assert not list(spool.storage.rglob("*.dcm"))


def test_a_write_that_takes_only_a_part_is_continued(spool, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    content = bytes(range(256)) * 4

    assert spool.absolute(settle(spool, header(), content)).read_bytes() == content


def test_leftovers_of_an_earlier_life_are_swept_and_only_those(spool):
    kept = settle(spool, header(), HEAD)
    (spool.storage / "incoming" / "abandoned").write_bytes(b"half")

    swept = Spool(spool.storage).sweep_incoming()

    assert swept == 1
    assert spool.absolute(kept).exists()
    assert not list((spool.storage / "incoming").iterdir())


def test_what_a_killed_worker_left_goes_once_it_is_old(spool):
    young, old = spool.storage / "incoming" / "young", spool.storage / "incoming" / "old"
    young.write_bytes(b"half")
    old.write_bytes(b"half")
    os.utime(old, (1.0, 1.0))

    assert spool.sweep_incoming(older_than=3600) == 1
    assert list((spool.storage / "incoming").iterdir()) == [young]


def test_a_folder_that_was_deleted_from_outside_is_made_again(spool):
    settle(spool, header(1))
    shutil.rmtree(spool.storage / "studies")

    assert spool.absolute(settle(spool, header(2))).exists()


def test_other_bytes_of_one_result_never_take_the_place_of_the_first(spool):
    first, first_digest = spool.keep_result("1.2.3", b"made at 10:00")
    second, second_digest = spool.keep_result("1.2.3", b"made at 10:01")

    assert spool.absolute(first).read_bytes() == b"made at 10:00"
    assert spool.absolute(second).read_bytes() == b"made at 10:01"
    assert first_digest != second_digest


def test_many_threads_let_many_instances_arrive(spool):
    failures = []

    def keep(number):
        file = arriving(spool, str(number).encode())
        try:
            file.keep(HEAD)
        except Exception as error:
            failures.append(error)
        finally:
            file.close()

    threads = [threading.Thread(target=keep, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not failures
    assert sorted(int(path.read_bytes()[len(HEAD) :]) for path in spool.inbox.waiting()) == list(range(50))


def test_the_descriptors_are_given_back(spool, descriptors):
    for number in range(20):
        settle(spool, header(number))
    assert descriptors(spool.storage)

    spool.inbox.close()

    assert descriptors(spool.storage) == []


def test_whoever_forgets_an_inbox_leaves_no_descriptors(tmp_path, descriptors):
    spool = Spool(tmp_path / "forgotten")
    settle(spool, header(1))
    spool.inbox._maker.shutdown()
    assert descriptors(tmp_path)

    del spool

    assert descriptors(tmp_path) == []


def test_one_folder_belongs_to_one_node(spool):
    spool.own()

    with pytest.raises(SettingsError, match="another node"):
        Spool(spool.storage).own()

    spool.disown()
    second = Spool(spool.storage)
    second.own()
    second.disown()


def test_who_is_in_the_middle_of_a_series_leaves_slots_to_those_who_begin(spool):
    spool.inbox._maker.shutdown()  # no more are made meanwhile
    arriving(spool, b"first").keep(HEAD)

    slots = spool.inbox.spare(1000)

    assert 10 < len(slots) < 1000
    assert spool.inbox.spare(1000) == []
    names = {path.name for path in spool.inbox.folder.iterdir()}
    for number in range(5):
        arriving(spool, bytes([number])).keep(HEAD)
    taken = {path.name for path in spool.inbox.waiting()}
    assert len(taken) == 6
    assert taken <= names, "none had to be made first"
    assert not taken & {Path(slot.path).name for slot in slots}
    spool.inbox.give_back(slots)


def test_slots_that_were_not_needed_are_used_by_others_but_for_what_was_written_to(spool):
    arriving(spool, b"first").keep(HEAD)
    slots = spool.inbox.spare(3)
    os.write(slots[0].descriptor, b"longer than what comes next")

    spool.inbox.give_back(list(slots), is_written=True)

    assert not Path(slots[0].path).exists()
    assert [spool.inbox.open(lead=0).path for _ in range(2)] == [slot.path for slot in slots[:0:-1]]


def test_slots_that_come_back_after_the_end_are_gone(spool):
    arriving(spool, b"content").keep(HEAD)
    slots = spool.inbox.spare(5)
    spool.inbox.close()

    spool.inbox.give_back(slots)

    assert in_inbox(spool) == [HEAD + b"content"]
