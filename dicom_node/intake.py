"""One instance, from bytes in memory to a fact: checked, on disk, in the ledger. Only then may it be acknowledged."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import UID

from dicom_node import __version__
from dicom_node.entities import AssociationIdentity, Header, Instance
from dicom_node.errors import InvalidInstance
from dicom_node.header import read_header
from dicom_node.labelling import derive_uid
from dicom_node.ledger import Ledger
from dicom_node.ledger.journal import Subject
from dicom_node.services import Status
from dicom_node.spool import Spool

IMPLEMENTATION_CLASS_UID = derive_uid("implementation", "dicom-node")
IMPLEMENTATION_VERSION_NAME = f"DICOM-NODE {__version__}"[:16]


class Outcome(StrEnum):
    """What became of an instance; each is acknowledged with 0x0000."""

    STORED = "stored"
    DUPLICATE = "duplicate"  # the same bytes are held already
    QUARANTINED = "quarantined"  # other bytes under the same SOP Instance UID: the first stay, these are set aside


class Intake:
    """The durable half of C-STORE, without the network."""

    def __init__(self, ledger: Ledger, spool: Spool, *, node_id: str, clock: Callable[[], float] = time.time) -> None:
        """Keep bytes in `spool` and facts in `ledger`."""
        self._ledger = ledger
        self._spool = spool
        self._node_id = node_id
        self._clock = clock
        self._locks = _KeyedLocks()

    def keep(
        self,
        dataset: memoryview,
        *,
        transfer_syntax_uid: str,
        affected_sop_class_uid: str,
        affected_sop_instance_uid: str,
        association: AssociationIdentity,
    ) -> tuple[Outcome, Header]:
        """Keep one dataset as it was sent.

        Raises:
            InvalidInstance: the data is no dataset (0xC000) or contradicts its command (0xA900).
            Unavailable: it cannot be kept now (0xA700); nothing of it remains.
        """
        header = read_header(dataset, transfer_syntax_uid)
        _check_command(header, affected_sop_class_uid, affected_sop_instance_uid)
        sha256 = hashlib.sha256(dataset).hexdigest()
        preamble = _preamble(
            header.sop_class_uid, header.sop_instance_uid, transfer_syntax_uid, association.calling_ae_title
        )
        # the same UID on two associations at once: one of them is first, the other finds it there
        with self._locks.holding(header.sop_instance_uid):
            held = self._ledger.arrivals.held(header.sop_instance_uid)
            if held is not None and held.sha256 == sha256:
                if held.series_is_open:
                    self._ledger.arrivals.hold(header.series_instance_uid, association, node_id=self._node_id)
                return Outcome.DUPLICATE, header
            if held is not None:
                return self._set_aside(header, sha256, preamble, dataset), header
            path = self._spool.keep(header, preamble, dataset)
            size = len(preamble) + len(dataset)
            instance = Instance(header, transfer_syntax_uid, path, sha256, size)
            self._ledger.arrivals.record(instance, association, node_id=self._node_id, now=self._clock())
            return Outcome.STORED, header

    def _set_aside(self, header: Header, sha256: str, preamble: bytes, dataset: memoryview) -> Outcome:
        path = self._spool.quarantine(header, sha256, preamble, dataset)
        subject = Subject(header.study_instance_uid, header.series_instance_uid)
        self._ledger.history.note("instance.quarantined", now=self._clock(), subject=subject, path=path)
        return Outcome.QUARANTINED


def _check_command(header: Header, sop_class_uid: str, sop_instance_uid: str) -> None:
    """Refuse a data set that is not what its command says it is (PS3.4 B.2.3)."""
    if header.sop_class_uid != sop_class_uid:
        raise InvalidInstance(
            Status.DATA_SET_DOES_NOT_MATCH_SOP_CLASS, "SOPClassUID differs from the command's", 0x00080016
        )
    if header.sop_instance_uid != sop_instance_uid:
        raise InvalidInstance(
            Status.DATA_SET_DOES_NOT_MATCH_SOP_CLASS, "SOPInstanceUID differs from the command's", 0x00080018
        )


def _preamble(sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str, calling_ae_title: str) -> bytes:
    """Return what stands before the dataset in a Part 10 file (PS3.10 Section 7.1)."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(sop_class_uid)
    meta.MediaStorageSOPInstanceUID = UID(sop_instance_uid)
    meta.TransferSyntaxUID = UID(transfer_syntax_uid)
    meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    meta.SourceApplicationEntityTitle = calling_ae_title
    buffer = DicomBytesIO()
    buffer.write(b"\x00" * 128 + b"DICM")
    write_file_meta_info(buffer, meta)
    return buffer.getvalue()


class _KeyedLocks:
    """One lock per key that is in use."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, tuple[threading.Lock, int]] = {}

    @contextmanager
    def holding(self, key: str) -> Iterator[None]:
        with self._guard:
            lock, users = self._locks.get(key, (threading.Lock(), 0))
            self._locks[key] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._guard:
                lock, users = self._locks[key]
                if users == 1:
                    del self._locks[key]
                else:
                    self._locks[key] = (lock, users - 1)
