"""A Storage SCP as pynetdicom's documentation shows it: every default, a handler that writes the file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pynetdicom import AE, AllStoragePresentationContexts, evt


def main(folder: Path, port: int) -> None:
    """Keep what comes in `folder`."""

    def handle_store(event: Any) -> int:
        with (folder / f"{event.request.AffectedSOPInstanceUID}.dcm").open("wb") as file:
            file.write(event.encoded_dataset())
        return 0x0000

    entity = AE()
    entity.supported_contexts = AllStoragePresentationContexts
    entity.maximum_associations = 64
    entity.start_server(("127.0.0.1", port), block=True, evt_handlers=[(evt.EVT_C_STORE, handle_store)])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
