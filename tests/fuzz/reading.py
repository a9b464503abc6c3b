"""Files through everything that reads files, in a process that may be lost: python -m tests.fuzz.reading FILE ...

Prints a JSON line for each file and reader: how it ended, in how many seconds, with how many MB more at the peak.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from dicom_node import log, rations
from dicom_node.attributes import read_attributes
from dicom_node.delivery.cstore import Parcel, _plain
from dicom_node.errors import NodeError
from dicom_node.images import read_source
from workers.slices import read_header
from workers.volume import load

ALLOWED = 6 << 30  # bytes of address space: what makes room for more ends here, and is seen


def _shown(path: Path) -> None:
    source = read_source([path])
    assert source.pixels is not None
    for frame in (0, len(source.frames) - 1):
        source.pixels(frame)


def _flat(path: Path) -> None:
    with rations.understood():
        load([path], SimpleNamespace(dimensions=2))  # type: ignore[arg-type]


def _volume(path: Path) -> None:
    with rations.understood():
        load([path])


READERS: dict[str, Callable[[Path], object]] = {
    "attributes": read_attributes,
    "header": read_header,
    "source": _shown,
    "volume": _volume,
    "frames": _flat,
    "parcel": Parcel.of_file,
    "plain": _plain,
}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def outcome(reader: Callable[[Path], object], path: Path) -> str:
    """Return `read`, the name of a deliberate error, or `DEFECT` with where it was."""
    try:
        reader(path)
    except NodeError as error:
        return type(error).__name__
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)
        ours = [at for at in place if "dicom_node" in at.filename or "workers" in at.filename][-1:]
        return f"DEFECT {type(error).__name__} " + " ".join(f"{Path(at.filename).name}:{at.lineno}" for at in ours)
    return "read"


def main() -> None:
    log.configure()
    resource.setrlimit(resource.RLIMIT_AS, (ALLOWED, ALLOWED))
    for path in map(Path, sys.argv[1:]):
        for name, reader in READERS.items():
            before, started = _peak(), time.monotonic()
            said = outcome(reader, path)
            seconds = round(time.monotonic() - started, 3)
            megabytes = round(_peak() - before)
            print(json.dumps({"file": path.name, "by": name, "said": said, "seconds": seconds, "megabytes": megabytes}))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
