"""Fuzzing led by coverage: python -m tests.fuzz.guided --target pdata --minutes N; needs the extra `fuzz` (atheris).

What leads elsewhere is kept in the folder `--corpus` for the next time, and so is what broke a target.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

_SECONDS, _MEGABYTES = 20, 2048  # that one input may take, and have


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["dicom_node", "pynetdicom.pdu", "pynetdicom.pdu_items"]):
        from tests.fuzz.targets import TARGETS, seeds

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--corpus", type=Path)
    wanted = parser.parse_args()
    folder = wanted.corpus or Path(tempfile.mkdtemp(prefix=f"fuzz-{wanted.target}-"))
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(wanted.target)):
        (folder / f"seed-{number}").write_bytes(seed)
    options = [
        f"-max_total_time={int(wanted.minutes * 60)}",
        f"-timeout={_SECONDS}",
        f"-rss_limit_mb={_MEGABYTES}",
        f"-artifact_prefix={folder}/",
        "-max_len=65536",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(folder)], TARGETS[wanted.target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
