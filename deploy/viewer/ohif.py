"""OHIF's published build: got with npm, checked against its digest, unpacked once."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

VERSION = "3.13.2"
SHA256 = "b189d3963bfc58e9394a9db8c7be75d07beb029ec211dbb126d47b62969dd3f1"
LEFT_OUT = ("ort/", "dicom-microscopy-viewer/")
"""Three quarters of the package: models of its own, and whole-slide images."""
_ROOT = "package/dist/"


class CannotFetch(Exception):
    """OHIF is not here and cannot be got; the message says what to do."""


def is_here(cache: Path) -> bool:
    """Return whether this version is unpacked already."""
    return (cache / VERSION / "index.html").is_file()


def fetch(cache: Path) -> Path:
    """Return the folder with OHIF's `index.html`; get it first where it is not in `cache`."""
    folder = cache / VERSION
    if is_here(cache):
        return folder
    npm = shutil.which("npm")
    if npm is None:
        raise CannotFetch("npm is missing and gets the viewer: apt-get install npm")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        package = _pack(npm, Path(work))
        _require_digest(package)
        unpacked = Path(work) / "dist"
        _unpack(package, unpacked)
        unpacked.rename(folder)
    return folder


def _pack(npm: str, folder: Path) -> Path:
    command = [npm, "pack", f"@ohif/app@{VERSION}", "--silent"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)  # noqa: S603 - npm itself
    packages = list(folder.glob("*.tgz"))
    if done.returncode or not packages:
        raise CannotFetch(f"npm could not get OHIF {VERSION} from its registry: {done.stderr.strip()[-500:]}")
    return packages[0]


def _require_digest(package: Path) -> None:
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    if digest != SHA256:
        raise CannotFetch(f"{package.name} is not the OHIF {VERSION} that was tested: sha256 {digest}")


def _unpack(package: Path, folder: Path) -> None:
    with tarfile.open(package) as archive:
        for member in archive:
            name = member.name.removeprefix(_ROOT)
            if member.isfile() and member.name.startswith(_ROOT) and not name.startswith(LEFT_OUT):
                archive.extract(member.replace(name=name), folder, filter="data")
