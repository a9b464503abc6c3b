"""Compressed images are decoded in processes beside the worker: the libraries' decoders let no other thread run.

A process is asked by a line of JSON and answers by a line and the bytes of the frames. What it cannot decode, or dies
of, is decoded in the worker, which then says what is wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import LifoQueue
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import structlog
from pydicom import Dataset
from pydicom.uid import UID, RLELossless

from dicom_node.images import decoded
from workers.slices import read_header

log = structlog.get_logger()

Frames = list[npt.NDArray[Any]]
Decode = Callable[[Path, Dataset, list[int]], Frames]
"""Returns some frames of a file, as `dicom_node.images.decoded` does."""

_MANY = 100  # frames; for fewer no process is worth its start, three quarters of a second of processor time
_FEW = 4  # processors; with fewer nothing is gained
_MOST = 8  # processes; the worker takes from them what it can
_END = 5.0  # seconds


def is_dear(header: Dataset) -> bool:
    """Return whether a frame of an image takes long to decode: compressed, and not in run lengths."""
    syntax = UID(str(getattr(header, "file_meta", {}).get("TransferSyntaxUID") or ""))
    return syntax.is_transfer_syntax and syntax.is_encapsulated and syntax != RLELossless


def count_for(frames: int) -> int:
    """Return in how many processes so many frames that are dear are best decoded; 0: in none but the worker's."""
    processors = len(os.sched_getaffinity(0))
    return min(processors, _MOST) if frames >= _MANY and processors >= _FEW else 0


class Decoders:
    """So many processes for the length of a `with` block, each started when there is something to do for it."""

    def __init__(self, count: int) -> None:
        """Prepare them."""
        self._idle: LifoQueue[_Decoder | None] = LifoQueue()
        for _ in range(count):
            self._idle.put(None)

    def __enter__(self) -> Decoders:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes; nobody asks them any more."""
        while not self._idle.empty():
            if (one := self._idle.get()) is not None:
                one.close()

    def __call__(self, path: Path, header: Dataset, frames: list[int]) -> Frames:
        """Return frames of a file; may be called from as many threads as there are processes, or more."""
        one = self._idle.get()
        try:
            one = one or _Decoder()
            answer = one.ask(path, frames)
        except (OSError, ValueError) as error:
            log.warning("decoder.lost", error=type(error).__name__)
            if one is not None:
                one.close()
            one = answer = None
        finally:
            self._idle.put(one)
        return decoded(path, header, frames) if answer is None else answer


class _Decoder:
    """One process, seen from the worker."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "workers.decoding"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the libraries quote what they read
        )

    def ask(self, path: Path, frames: Sequence[int]) -> Frames | None:
        """Return frames; None where they cannot be decoded. Raises OSError or ValueError where the process is lost."""
        questions, answers = self._process.stdin, self._process.stdout
        if questions is None or answers is None:
            raise OSError("no pipes")
        questions.write(json.dumps([os.fspath(path), list(frames)]).encode() + b"\n")
        questions.flush()
        told: list[list[Any]] | None = json.loads(answers.readline())
        return None if told is None else [_frame(answers, str(dtype), shape) for dtype, shape in told]

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _frame(file: IO[bytes], dtype: str, shape: Sequence[int]) -> npt.NDArray[Any]:
    frame = np.empty(shape, dtype)
    view, at = frame.data.cast("B"), 0
    while at < len(view):
        read = file.readinto(view[at:])  # type: ignore[attr-defined]
        if not read:
            raise OSError("the process has ended")
        at += read
    return frame


def serve(questions: IO[bytes], answers: IO[bytes]) -> None:
    """Answer questions until there are no more: the worker has ended, or wants no more."""
    for line in questions:
        path, frames = json.loads(line)
        try:
            made = decoded(Path(path), read_header(Path(path)), list(frames))
        except Exception:
            # whatever it is: the worker decodes it again, and says it
            answers.write(b"null\n")
        else:
            whole = [np.ascontiguousarray(frame) for frame in made]
            answers.write(json.dumps([[frame.dtype.str, frame.shape] for frame in whole]).encode() + b"\n")
            for frame in whole:
                answers.write(frame.data.cast("B"))
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
