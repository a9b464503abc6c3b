"""The series that a job runs on: its own, and where the model takes several, others of the study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import structlog
from pydicom import Dataset

from dicom_node.catalogue import ModelFolder
from dicom_node.errors import InputRefused, NotApplicable
from dicom_node.findings import Reason
from dicom_node.ledger import Ledger
from dicom_node.ledger.arrivals import StoredInstance
from dicom_node.ledger.moving import Job
from dicom_node.manifest import InputSlot, Manifest
from dicom_node.selection import objections, rank
from dicom_node.services import Use, use_of
from dicom_node.spool import Spool
from workers.alignment import aligned, require_one_frame
from workers.fitness import check_input
from workers.foresight import Foresight
from workers.plain import Headers
from workers.slices import flat_header, read_header
from workers.volume import Volume, load

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a job runs on: the volume that results are drawn on, with the others, and all instances that went in."""

    volume: Volume
    instances: tuple[StoredInstance, ...]


class Choosing:
    """Reads a job's series, and finds what else its model needs."""

    def __init__(self, ledger: Ledger, spool: Spool) -> None:
        """Look for series in `ledger` and their files in `spool`."""
        self._ledger = ledger
        self._spool = spool
        self._load = Foresight(self._read)

    def foresee(self, series_instance_uid: str, manifest: Manifest) -> Volume | None:
        """Read a series before it is asked for; return None where another is held. Raises what a job for it would."""
        return self._load.foresee(self._images(series_instance_uid), manifest.input)

    def __call__(self, job: Job, found: ModelFolder) -> Chosen:
        """Return what the job runs on.

        Raises:
            NotApplicable: the series is not what the model was made for, a better one of the study is there, or
                one that the model needs as well is not.
            InputRefused: a file cannot be read, or its pixels cannot be decoded here.
        """
        manifest = found.manifest
        instances = self._images(job.series_instance_uid)
        volume = self._load(instances, manifest.input)
        _require_one_patient(_different(volume))
        check_input(volume, manifest.input)
        if manifest.input.prefer:
            self._require_best(job, manifest, volume)
        others = {}
        used = list(instances)
        for name, slot in list(manifest.inputs.items())[1:]:
            other, theirs = self._companion(job, name, slot, volume)
            _require_one_patient([volume.source.datasets[0], *_different(other)])
            others[name] = aligned(other.grid, volume.grid)
            used += theirs
        return Chosen(replace(volume, grid=replace(volume.grid, others=others)) if others else volume, tuple(used))

    def _images(self, series_instance_uid: str) -> list[StoredInstance]:
        return [
            instance
            for instance in self._ledger.arrivals.instances_of(series_instance_uid)
            if use_of(instance.sop_class_uid) is not Use.KEPT
        ]

    def _read(self, instances: Sequence[StoredInstance], slot: InputSlot) -> Volume:
        return load([self._spool.absolute(instance.path) for instance in instances], slot)

    def _candidates(self, job: Job, slot: InputSlot) -> list[tuple[tuple[float, ...], str, list[StoredInstance]]]:
        """Return the study's other series whose headers suit a slot, the best first."""
        found = []
        for uid in self._ledger.arrivals.complete_series_of(job.study_instance_uid or ""):
            instances = [] if uid == job.series_instance_uid else self._images(uid)
            header = self._header(instances)
            if header is not None and not any(True for _ in objections(header, slot)):
                found.append((rank(header, len(instances), slot), uid, instances))
        return sorted(found, key=lambda one: one[:2])

    def _header(self, instances: Sequence[StoredInstance]) -> Dataset | None:
        if not instances:
            return None
        try:
            return flat_header(read_header(self._spool.absolute(instances[len(instances) // 2].path)), 1)
        except InputRefused:
            return None

    def _require_best(self, job: Job, manifest: Manifest, volume: Volume) -> None:
        """Raise NotApplicable where another series that is routed to the model is preferred to this one."""
        own = (rank(volume.header, len(volume.source.frames), manifest.input), job.series_instance_uid)
        routed = self._ledger.jobs.series_inferred(job.study_instance_uid or "", job.model)
        for better, uid, _ in self._candidates(job, manifest.input):
            if uid in routed and (better, uid) < own:
                raise NotApplicable(
                    Reason.BETTER_SERIES, f"series {uid} of the study is preferred: {', '.join(manifest.input.prefer)}"
                )

    def _companion(self, job: Job, name: str, slot: InputSlot, volume: Volume) -> tuple[Volume, list[StoredInstance]]:
        """Return the best series of the study for another slot."""
        frame = str(volume.source.datasets[0].get("FrameOfReferenceUID") or "")
        why = "no other complete series of the study is what it asks for"
        for _, _, instances in self._candidates(job, slot):
            try:
                other = self._load(instances, slot)
                check_input(other, slot)
                require_one_frame(frame, str(other.source.datasets[0].get("FrameOfReferenceUID") or ""))
            except (NotApplicable, InputRefused) as error:
                why = str(error)
                continue
            return other, instances
        raise NotApplicable(Reason.MISSING_INPUT, f"inputs.{name}: {why}")


def _different(volume: Volume) -> Sequence[Dataset]:
    """Return the headers of a volume, of those that say the same of study and patient only one."""
    datasets = volume.source.datasets
    return datasets.different() if isinstance(datasets, Headers) else datasets


def _require_one_patient(headers: Sequence[Dataset]) -> None:
    """Refuse images that say that they are of different studies or patients: somebody mixed them up."""
    for keyword in ("StudyInstanceUID", "PatientID"):
        if len({str(header.get(keyword) or "") for header in headers}) > 1:
            raise InputRefused(f"the instances of the series have more than one {keyword}")
