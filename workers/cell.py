"""A model that lives in a process of its own: started, asked, watched, ended. The worker outlives whatever it does."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import select
import site
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import structlog

from dicom_node.errors import ModelRefused, NotApplicable
from dicom_node.findings import Reason
from dicom_node.manifest import Manifest
from workers import scratch
from workers.containment import Cell, Walls, installation
from workers.handing import Handing
from workers.passing import read_prediction
from workers.prediction import Grid, Prediction, Progress

log = structlog.get_logger()

Answer = TypeVar("Answer")

_STOP = 2.0  # seconds that a model may take to stop between two windows, before its process is ended
_TICK = 0.05  # seconds between two looks at a child's memory
_LONGEST_LINE = 8 << 20  # bytes
_LONGEST_WORDS = 400
_MEGABYTE = 1 << 20
_CHUNK = 1 << 16
_SILENCE: dict[str, Any] = {}

# what a child sees of the environment: no password, no address of a database or a broker is among it
_KEPT = re.compile(
    r"^(LANG|LC_\w+|TZ|LD_LIBRARY_PATH|CUDA_\w+|NVIDIA_\w+|G?OMP_\w+|MKL_\w+|OPENBLAS_NUM_THREADS|THP_MEM_ALLOC_ENABLE)$"
)

# a child dies with the thread that started it, so that thread must live as long as the worker
_STARTER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="starts contained models")


class ContainedModel:
    """One model in a cell. It is started when it is first needed, and again after it has been ended."""

    def __init__(
        self,
        manifest: Manifest,
        furnish: Callable[[Path], None],
        device: str,
        found: Walls,
        packages: Sequence[Path] = (),
    ) -> None:
        """Run on `device` (cpu, cuda or cuda:N).

        `furnish` puts the model's verified files into a folder; it is called at each start, and raises ModelRefused.
        `packages` are folders of installed code, beyond Python's own, that the model may read.
        """
        self._manifest = manifest
        self._furnish = furnish
        self._device = device
        self._walls = found
        self._packages = packages
        self._child: _Child | None = None

    def start(self) -> None:
        """Start the child and wait until the model is loaded; raise ModelRefused where it cannot be."""
        if self._child is not None and self._child.is_alive:
            return
        self.end()
        self._child = _Child(self._manifest, self._device, self._walls, self._packages)
        try:
            self._child.load(self._furnish)
        except BaseException:
            self.end()
            raise

    def prepare(self, grid: Grid) -> None:
        """Get ready for a grid that the model will be asked about, where it runs; others may be asked about before."""
        child = self._child
        if child is not None:
            child.prepare(grid)

    def __call__(self, grid: Grid, progress: Progress) -> Prediction:
        """Predict.

        Raises:
            ModelRefused: the model failed, needed more than its limits allow, or its answer is not one.
            NotApplicable: the model says that it was not made for this.
        """
        return self._asked(lambda child: child.predict(grid, progress))

    def many(self, grids: Sequence[Grid], progress: Progress) -> list[Prediction]:
        """Predict for several grids at once; raise what a prediction raises, if only one of them is at fault."""
        return self._asked(lambda child: child.predict_many(grids, progress))

    def _asked(self, ask: Callable[[_Child], Answer]) -> Answer:
        self.start()
        assert self._child is not None  # noqa: S101 - start() raises otherwise
        try:
            return ask(self._child)
        except NotApplicable:
            raise
        except ModelRefused:
            self.end()
            raise
        except BaseException:
            # what `progress` raises: the job was cancelled, or gives way
            if not self._child.stops(within=_STOP):
                self.end()
            raise

    @property
    def resident_megabytes(self) -> float:
        """Return the memory that the child holds now, in MiB; 0 where there is none."""
        return 0.0 if self._child is None else self._child.memory / _MEGABYTE

    @property
    def pid(self) -> int | None:
        """Return the child's process number."""
        return None if self._child is None else self._child.pid

    def end(self) -> None:
        """End the child, and remove everything that it wrote."""
        child, self._child = self._child, None
        if child is not None:
            child.end()


class _Child:
    """One life of a contained process."""

    def __init__(self, manifest: Manifest, device: str, found: Walls, packages: Sequence[Path]) -> None:
        self._manifest = manifest
        self._device = device
        self._walls = found
        self._packages = packages
        self._scratch, self._lock = scratch.hold()
        self._given, self._work = self._scratch / "given", self._scratch / "work"
        self._folder = self._scratch / manifest.name
        for folder in (self._work, self._folder):
            folder.mkdir()
        self._handing = Handing(self._given, self._scratch / "aside")
        self._heard = bytearray()
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = -1

    def load(self, furnish: Callable[[Path], None]) -> None:
        """Start the process and have it load the model."""
        furnish(self._folder)
        self._answers, told = os.pipe()
        try:
            self._process = _STARTER.submit(self._started, told).result()
        finally:
            os.close(told)
        self._order(
            {
                "parent": os.getpid(),
                "walls": dataclasses.asdict(self._walls),
                "cell": dataclasses.asdict(self._cell()),
                "folder": str(self._folder),
                "given": str(self._given),
                "work": str(self._work),
                "device": self._device,
            }
        )
        self._hear("ready", lambda part: None)

    def _started(self, told: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-P", "-m", "workers.contained", str(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(told,),
            cwd=self._work,
            env=self._environment(),
            start_new_session=True,
            bufsize=0,
        )

    def _environment(self) -> dict[str, str]:
        home = str(self._work)
        path = [str(Path(__file__).resolve().parents[1]), *(str(package.parent) for package in self._packages)]
        own: dict[str, str] = {
            "HOME": home,
            "TMPDIR": home,
            "XDG_CACHE_HOME": home,
            "USER": "model",  # libraries ask for it, and would look it up in a file that is not theirs to read
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
            "PYTHONDONTWRITEBYTECODE": "1",
            **({"PYTHONUSERBASE": site.getuserbase()} if site.ENABLE_USER_SITE else {}),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it cuBLAS does not repeat itself
        }
        return {name: value for name, value in os.environ.items() if _KEPT.match(name)} | own

    def _cell(self) -> Cell:
        memory = self._manifest.limits.memory_megabytes * _MEGABYTE
        packages = [str(package) for package in self._packages]
        roots = [str(Path(__file__).resolve().parents[1]), *(str(package.parent) for package in self._packages)]
        return Cell(
            reads=(*installation(), str(self._folder), str(self._given), *packages),
            lists=tuple(dict.fromkeys(roots)),
            writes=(str(self._work),),
            memory=0 if self._device.startswith("cuda") else memory,
            files=memory,
        )

    def prepare(self, grid: Grid) -> None:
        """Write down a grid that the model will be asked about."""
        with suppress(OSError):  # it is written when it is asked about, or the job says why not
            self._handing.prepare(grid)

    def predict(self, grid: Grid, progress: Progress) -> Prediction:
        """Have the model predict."""
        self._order(self._handing.give(grid))
        message = self._hear("answer", progress)
        try:
            return read_prediction(message, self._work, grid, self._manifest)
        finally:
            scratch.empty(self._work)

    def predict_many(self, grids: Sequence[Grid], progress: Progress) -> list[Prediction]:
        """Have the model predict for several grids in one."""
        orders = [self._handing.give(grid, str(number)) for number, grid in enumerate(grids)]
        self._order({"several": orders})
        message = self._hear("answers", progress)
        answers = message.get("several")
        try:
            if not isinstance(answers, list) or len(answers) != len(grids):
                raise ModelRefused(f"{self._manifest.name}: the model's process does not keep to the protocol")
            return [
                read_prediction(answer, self._work / str(number), grid, self._manifest)
                for number, (answer, grid) in enumerate(zip(answers, grids, strict=True))
            ]
        finally:
            scratch.empty(self._work)
            self._handing.clear()

    def stops(self, *, within: float) -> bool:
        """Ask the model to stop between two windows; return whether it has, `within` seconds."""
        deadline = time.monotonic() + within
        try:
            self._order({"stop": True})
            for message in self._messages():
                if message.get("said") in ("stopped", "answer", "answers"):
                    return True
                if time.monotonic() > deadline or (message is not _SILENCE and message.get("said") != "progress"):
                    break
        except ModelRefused:
            pass
        finally:
            scratch.empty(self._work)
        return False

    # -- talking ------------------------------------------------------------------------------------------------

    def _order(self, message: dict[str, Any]) -> None:
        stdin = self._process.stdin if self._process is not None else None
        assert stdin is not None  # noqa: S101 - load() started it with a pipe
        os.set_blocking(stdin.fileno(), False)  # a child that does not listen must not hold the worker up
        try:
            stdin.write(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise self._died() from error

    def _hear(self, awaited: str, progress: Progress) -> dict[str, Any]:
        """Return the message that is waited for; hand on progress; raise what the child says went wrong.

        `progress` is called while the child is silent, too: so a job that was taken away ends at any moment.
        """
        part = 0.0
        for message in self._messages():
            said = message.get("said")
            if said == awaited:
                return message
            if said == "progress":
                part = _fraction(message.get("part"))
            elif message is not _SILENCE:
                self._raise(message)
            progress(part)
        raise self._died()

    def _raise(self, message: dict[str, Any]) -> None:
        name, said = self._manifest.name, message.get("said")
        if said == "not_applicable" and message.get("reason") in list(Reason):
            raise NotApplicable(Reason(message["reason"]), _words(message.get("detail")))
        if said == "refused":
            told = _words(message.get("message"))
            raise ModelRefused(told if told.startswith(f"{name}:") else f"{name}: {told}")
        if said == "memory":
            raise self._too_much()
        if said == "failed":
            error = _words(message.get("error"))
            error = error if error.isidentifier() else "an error"
            places = message.get("places")
            shown = [_words(at) for at in places[:8]] if isinstance(places, list) else []
            log.error("model.failed", model=name, error=error, places=shown)
            raise ModelRefused(f"{name}: the model failed with {error}")
        raise ModelRefused(f"{name}: the model's process does not keep to the protocol")

    def _messages(self) -> Iterator[dict[str, Any]]:
        """Yield what the child says, and its silence, until it is gone; raise where it uses more than it may."""
        deadline = time.monotonic() + self._manifest.limits.seconds
        while True:
            line, found, rest = self._heard.partition(b"\n")
            if found:
                self._heard = rest
                yield self._parsed(bytes(line))
            elif len(line) > _LONGEST_LINE:
                raise ModelRefused(f"{self._manifest.name}: the model's process does not keep to the protocol")
            self._watch(deadline)
            if found:
                continue
            if select.select([self._answers], [], [], _TICK)[0]:
                heard = os.read(self._answers, _CHUNK)
                if not heard:
                    return
                self._heard += heard
            else:
                yield _SILENCE

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        return message if isinstance(message, dict) else {"said": None}

    # -- watching -----------------------------------------------------------------------------------------------

    def _watch(self, deadline: float) -> None:
        limits, name = self._manifest.limits, self._manifest.name
        if self.memory > limits.memory_megabytes * _MEGABYTE:
            raise self._too_much()
        if time.monotonic() > deadline:
            raise ModelRefused(f"{name}: needed more than limits.seconds = {limits.seconds:g}")

    def _too_much(self) -> ModelRefused:
        limit = self._manifest.limits.memory_megabytes
        return ModelRefused(f"{self._manifest.name}: needed more than limits.memory_megabytes = {limit}")

    def _died(self) -> ModelRefused:
        process = self._process
        assert process is not None  # noqa: S101 - only a child that was started can die
        process.kill()
        code = process.wait()
        how = f"signal {-code}" if code < 0 else f"status {code}"
        log.error("model.died", model=self._manifest.name, how=how)
        return ModelRefused(f"{self._manifest.name}: the model's process died ({how})")

    @property
    def is_alive(self) -> bool:
        """Return whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Return the process's number."""
        return self._process.pid if self._process is not None else None

    @property
    def memory(self) -> int:
        """Return the bytes that the process holds for itself: memory, and files in its scratch folder.

        Pages of libraries and weights that are mapped from files do not count: the system takes them back.
        """
        return (_held(self._process.pid) if self._process is not None else 0) + scratch.written(self._work)

    def end(self) -> None:
        """Kill the process, which nothing survives, and remove its folder."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()
        if self._answers >= 0:
            os.close(self._answers)
        self._handing.close()
        os.close(self._lock)
        scratch.remove(self._scratch)


def _held(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem") if name in fields)


def _fraction(value: Any) -> float:
    return min(max(float(value), 0.0), 1.0) if type(value) in (int, float) and value == value else 0.0


def _words(value: Any) -> str:
    text = value if isinstance(value, str) else ""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:_LONGEST_WORDS]
