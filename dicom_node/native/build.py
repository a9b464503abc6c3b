"""Compiles what is native, where there is a C compiler: for a package that is being built, or by hand.

    python dicom_node/native/build.py

Without a compiler the package is the same, and slower: everything that is native is there in Python as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # by hand, in an environment that builds nothing
    BuildHookInterface = object

HERE = Path(__file__).parent
SOURCES = "receive.c", "scan.c", "names.c", "digest.c", "message.c", "take.c"
LIBRARY = HERE / "library.so"
_FLAGS = "-O3", "-Wall", "-Wextra", "-shared", "-fPIC", "-Wl,-z,relro,-z,now"


def compile_library() -> str:
    """Compile `LIBRARY`; return why there is none, or nothing."""
    LIBRARY.unlink(missing_ok=True)  # an old one is worse than none
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not sys.platform.startswith("linux") or not compiler:
        return "there is no C compiler (apt-get install gcc libc6-dev)"
    made = LIBRARY.with_suffix(f".{os.getpid()}")
    command = [*compiler.split(), *_FLAGS, "-o", str(made), *(str(HERE / source) for source in SOURCES)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            return f"{compiler} failed: {done.stderr.strip()[-500:]}"
        made.replace(LIBRARY)
    except OSError as error:
        return f"{compiler} cannot be run: {error.strerror}"
    finally:
        made.unlink(missing_ok=True)
    return ""


class NativeHook(BuildHookInterface):  # type: ignore[misc]
    """Puts the library into a wheel, which is then one for this kind of machine."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the files are gathered."""
        if missing := compile_library():
            self.app.display_warning(f"dicom-node will receive slower than it could: {missing}")
            return
        if version != "editable":
            build_data["artifacts"].append("dicom_node/native/library.so")
            build_data["pure_python"] = False
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"


if __name__ == "__main__":
    sys.exit(compile_library() or None)
