"""What must be true after every fault, whatever it was: asked of files, ledger and destination, not of the code."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydicom import Dataset
from xxhash import xxh3_128_hexdigest

from dicom_node.errors import LedgerUnavailable
from dicom_node.ledger import Ledger
from dicom_node.part10 import dataset_digest
from tests.acceptance.stand import NodeProcess, wait_for
from tests.faults.scanner import Acknowledged, Image

TO_DO = ("queued", "running", "committing")
IN_BETWEEN = ("incoming", "arrived")
"""Folders of the storage in which there is nothing when nothing is going on, but slots."""


def settled(running: NodeProcess, studies: Sequence[Sequence[Image]], *, models: Sequence[str]) -> bool:
    """Return whether every instance is recorded and every series' last revision delivered, by every model."""
    ledger = running.ledger
    try:
        series = {row["series_instance_uid"]: row for row in ledger.history.recent_series(limit=10_000)}
        jobs = ledger.history.recent_jobs(limit=100_000)
    except LedgerUnavailable:
        return False
    finally:
        ledger.close()
    sent = Counter(image.series_instance_uid for images in studies for image in images)
    whole = all(uid in series and series[uid]["received"] == count for uid, count in sent.items())
    closed = all(row["complete_revision"] == row["revision"] for row in series.values())
    wanted = {(uid, series[uid]["revision"], model) for uid in sent for model in models} if whole else set()
    done = {
        (job["series_instance_uid"], job["revision"], job["model"])
        for job in jobs
        if job["kind"] == "deliver" and job["state"] == "done"
    }
    return whole and closed and wanted <= done and not any(job["state"] in TO_DO for job in jobs)


def wait_until_settled(
    running: NodeProcess, studies: Sequence[Sequence[Image]], *, models: Sequence[str], seconds: float = 120.0
) -> None:
    """Wait for it; the failure shows the jobs and the end of the log."""
    try:
        wait_for("all to be delivered", lambda: settled(running, studies, models=models), seconds=seconds, every=0.3)
    except AssertionError as error:
        jobs = [(job["job_id"], job["kind"], job["state"], job["revision"], job["reason"]) for job in running.jobs()]
        raise AssertionError(f"{error}\n{jobs}\n{running.log()[-5000:]}") from None


def kept(ledger: Ledger, storage: Path, acknowledged: Iterable[Acknowledged]) -> None:
    """Every acknowledged instance is in the ledger and on disk, and both are what was sent."""
    held = held_in(ledger)
    for each in acknowledged:
        uid = each.image.sop_instance_uid
        assert uid in held, f"acknowledged and not in the ledger: {uid}"
        assert held[uid].digest == each.image.digest, f"the ledger's digest is not that of what was sent: {uid}"
        with (storage / held[uid].path).open("rb") as file:
            assert dataset_digest(file, each.image.digest) == each.image.digest, f"the file is not what was sent: {uid}"


def held_in(ledger: Ledger) -> dict[str, Any]:
    """Return every instance that the ledger has."""
    return {
        instance.sop_instance_uid: instance
        for row in ledger.history.recent_series(limit=10_000)
        for instance in ledger.arrivals.instances_of(row["series_instance_uid"])
    }


def nothing_left_over(ledger: Ledger, storage: Path) -> None:
    """No temporary file is there, and every file of the storage is one that the ledger knows."""
    between = [path for name in IN_BETWEEN for path in (storage / name).rglob("*") if path.is_file()]
    between = [path for path in between if path.suffix != ".slot" or path.stat().st_size]  # for what will arrive
    assert not between, f"left behind: {between}"
    instances = {instance.path for instance in held_in(ledger).values()}
    results = {row["path"] for row in ledger.history.results(limit=100_000)}
    for folder, known in (("studies", instances), ("results", results)):
        files = {str(path.relative_to(storage)) for path in (storage / folder).rglob("*") if path.is_file()}
        assert known <= files, f"in the ledger and not on disk: {sorted(known - files)}"
        assert files <= known, f"on disk and not in the ledger: {sorted(files - known)}"


def whole(left: Mapping[str, bytes | None], images: Mapping[str, Image]) -> None:
    """Every file under its final name is whole: of those left by a crash (path to content)."""
    for path, content in left.items():
        top, _, name = path.partition("/")
        if content is None or not name.endswith(".dcm"):
            continue
        if top == "studies":
            uid = Path(name).name.removesuffix(".dcm")
            length = 144 + int.from_bytes(content[140:144], "little")
            assert xxh3_128_hexdigest(content[length:]) == images[uid].digest, f"partial: {path}"
        if top == "results":
            digest = Path(name).name.split(".")[-2]
            assert hashlib.sha256(content).hexdigest().startswith(digest), f"partial: {path}"


def results_once(
    ledger: Ledger,
    received: Sequence[Dataset],
    studies: Sequence[Sequence[Image]],
    *,
    models: Sequence[str],
    modalities: Sequence[str] = ("SEG", "SR"),
) -> None:
    """Each series' last revision has one result of each kind and model at the destination, and none is strange."""
    known = {row["sop_instance_uid"]: row for row in ledger.history.results(limit=100_000)}
    delivered = Counter(
        (job["series_instance_uid"], job["revision"], job["model"])
        for job in ledger.history.recent_jobs(limit=100_000)
        if job["kind"] == "deliver" and job["state"] == "done"
    )
    assert set(delivered.values()) <= {1}, f"delivered by more jobs than one: {delivered}"
    series_of_job = {job["job_id"]: job["series_instance_uid"] for job in ledger.history.recent_jobs(limit=100_000)}
    found: Counter[tuple[str, int, str, str]] = Counter()
    for dataset in received:
        row = known.get(str(dataset.SOPInstanceUID))
        assert row is not None, f"at the destination and not in the ledger: {dataset.SOPInstanceUID}"
        found[series_of_job[row["job_id"]], row["revision"], row["model"], str(dataset.Modality)] += 1
    assert set(found.values()) <= {1}, f"doubled: {[key for key, count in found.items() if count > 1]}"
    complete = {
        (row["series_instance_uid"], row["revision"], model)
        for row in ledger.history.recent_series(limit=10_000)
        for model in models
    }
    assert {key[0] for key in complete} >= {image.series_instance_uid for images in studies for image in images}
    for key in complete | set(delivered):
        there = {modality for modality in modalities if found[(*key, modality)]}
        assert there == set(modalities), f"missing for {key}: {set(modalities) - there}"


def same_bytes(received: Sequence[Any]) -> None:
    """Whatever came twice came with the same bytes."""
    first: dict[str, bytes] = {}
    for each in received:
        assert first.setdefault(each.sop_instance_uid, each.content) == each.content, (
            f"two contents of {each.sop_instance_uid}"
        )


def all_kept(
    running: NodeProcess,
    acknowledged: Mapping[str, Acknowledged],
    received: Sequence[Dataset],
    studies: Sequence[Sequence[Image]],
    *,
    models: Sequence[str],
) -> None:
    """Check every promise on a node that has settled."""
    ledger = running.ledger
    storage = running.folder / "storage"
    try:
        sent = {image.sop_instance_uid for images in studies for image in images}
        assert acknowledged.keys() == sent, f"never acknowledged: {sent - acknowledged.keys()}"
        kept(ledger, storage, acknowledged.values())
        results_once(ledger, received, studies, models=models)
        if not _is_tidy(ledger, storage):  # what a killed worker has written goes at the next start, or in a day
            running.terminate()
            _age(storage / "results")
            running.start()
            with contextlib.suppress(AssertionError):
                wait_for("what is left over to go", lambda: _is_tidy(ledger, storage), seconds=20)
        nothing_left_over(ledger, storage)
        assert running.answers(), "the node does not answer"
    finally:
        ledger.close()


def _age(folder: Path) -> None:
    """Make every file two days old."""
    then = time.time() - 2 * 86400
    for path in folder.rglob("*.dcm"):
        os.utime(path, (then, then))


def _is_tidy(ledger: Ledger, storage: Path) -> bool:
    try:
        nothing_left_over(ledger, storage)
    except AssertionError:
        return False
    return True
