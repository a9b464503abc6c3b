"""An application entity that plays the PACS: it keeps what it is sent, as it was sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydicom.filereader import read_file_meta_info
from pynetdicom import AE, evt

from dicom_node.services import STORAGE_SOP_CLASSES, TRANSFER_SYNTAXES, VERIFICATION


class Pacs:
    """A Storage SCP that writes each instance to a folder by its SOP Instance UID."""

    def __init__(self, folder: Path, *, ae_title: str = "PACS") -> None:
        """Keep instances in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._ae_title = ae_title
        self._server: Any = None

    def start(self) -> int:
        """Listen on a free loopback port and return it."""
        entity = AE(ae_title=self._ae_title)
        entity.add_supported_context(VERIFICATION)
        for sop_class in STORAGE_SOP_CLASSES:
            entity.add_supported_context(sop_class.uid, list(TRANSFER_SYNTAXES))
        handlers: list[Any] = [(evt.EVT_C_STORE, self._on_c_store), (evt.EVT_C_ECHO, lambda event: 0)]
        self._server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        return int(self._server.socket.getsockname()[1])

    def stop(self) -> None:
        """Stop listening."""
        self._server.shutdown()

    def received(self, sop_class_uid: str) -> list[Path]:
        """Return the files of one SOP Class that have come, in the order of their names."""
        return [
            path
            for path in sorted(self._folder.glob("*.dcm"))
            if read_file_meta_info(path).MediaStorageSOPClassUID == sop_class_uid
        ]

    def kept(self) -> set[str]:
        """Return the SOP Instance UIDs that have come."""
        return {path.stem for path in self._folder.glob("*.dcm")}

    def _on_c_store(self, event: Any) -> int:
        path = self._folder / f"{event.request.AffectedSOPInstanceUID}.dcm"
        part = path.with_suffix(".part")
        part.write_bytes(event.encoded_dataset())
        part.replace(path)
        return 0
