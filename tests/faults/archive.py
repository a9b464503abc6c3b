"""The destination: a scripted peer (pynetdicom) that does what no real PACS can be made to do, and forgets nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from pydicom import Dataset, dcmread
from pynetdicom import AE, evt

from dicom_node.services import RESULT_SOP_CLASSES
from tests.acceptance.stand import free_port
from tests.datasets import EXPLICIT, IMPLICIT

STORED = {0x0000, 0x0001, 0x0107, 0x0111, 0x0116, *range(0xB000, 0xC000)}
"""Success, and warnings about what was stored (PS3.7 Annex C)."""


@dataclass(frozen=True, slots=True)
class Received:
    """One result object that the archive answered with success, and when by the test's own clock."""

    sop_instance_uid: str
    content: bytes  # the data set
    syntax: str
    at: int

    def dataset(self) -> Dataset:
        """Return it decoded."""
        return dcmread(BytesIO(_part10(self.content, self.syntax)), force=True)


def _part10(content: bytes, syntax: str) -> bytes:
    from pydicom.dataset import FileMetaDataset
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_file_meta_info
    from pydicom.uid import UID

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID(syntax)
    buffer = DicomBytesIO()
    buffer.write(b"\0" * 128 + b"DICM")
    write_file_meta_info(buffer, meta, enforce_standard=False)
    return buffer.getvalue() + content


def accept(_event: Any) -> int:
    """Answer success."""
    return 0x0000


@dataclass
class Archive:
    """Takes every result object; `answer` is asked first, and what it answers is the status."""

    answer: Callable[[Any], int] = accept
    ticks: Callable[[], int] = lambda: 0
    port: int = field(default_factory=free_port)
    received: list[Received] = field(default_factory=list)
    asked: int = 0  # C-STORE requests
    _server: Any = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, *, reject: bool = False, **options: Any) -> Archive:
        """Listen; with `reject`, turn every association away for good."""
        entity = AE(ae_title="ARCHIVE" if reject else "ORTHANC")
        entity.require_called_aet = reject
        for sop_class in RESULT_SOP_CLASSES:
            entity.add_supported_context(sop_class, [EXPLICIT, IMPLICIT])
        for name, value in options.items():
            setattr(entity, name, value)
        handlers = [(evt.EVT_C_STORE, self._store)]
        self._server = entity.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers)
        return self

    def _store(self, event: Any) -> int:
        with self._lock:
            self.asked += 1
        answer = self.answer(event)
        if answer in STORED:
            content = event.request.DataSet.getvalue()
            uid, syntax = str(event.request.AffectedSOPInstanceUID), str(event.context.transfer_syntax)
            with self._lock:
                self.received.append(Received(uid, content, syntax, self.ticks()))
        return answer

    def stop(self) -> None:
        """Drop every association and listen no more."""
        if self._server is not None:
            for association in self._server.active_associations:
                association.abort(block=False)
            self._server.shutdown()
            self._server = None

    def holds(self, *, until: int | None = None) -> dict[str, Received]:
        """Return what is held under each SOP Instance UID, received before `until`."""
        return {each.sop_instance_uid: each for each in self.received if until is None or each.at <= until}
