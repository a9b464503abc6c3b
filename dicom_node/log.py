"""Structured logs: an event's name and its fields, one line per unit of work, and never a patient's identity."""

from __future__ import annotations

import io
import logging
import sys
import threading
import traceback
import warnings
from typing import TextIO, cast

import pydicom.config
import structlog
from pynetdicom import _config as pynetdicom_config

from dicom_node import tally

FORBIDDEN = frozenset({"patient_name", "patient_id", "patient_birth_date", "accession_number"})

_PLACES = 10


def configure(*, verbose: bool = False) -> None:
    """Set up logging for a process: readable lines on a terminal, JSON otherwise, on standard error."""
    level = logging.DEBUG if verbose else logging.INFO
    terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _counted,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=not terminal),
            _without_identity,
            _with_trace,
            structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, _StandardError())),
        cache_logger_on_first_use=True,
    )
    _silence_libraries()
    threading.excepthook = _thread_defect


def _thread_defect(defect: threading.ExceptHookArgs) -> None:
    """Say where a thread died, by type and place: what Python prints may quote what a patient is called."""
    structlog.get_logger().error("thread.defect", exc_info=defect.exc_value)


class _StandardError(io.TextIOBase):
    """Standard error as it is at the moment of writing: tests and daemons replace it."""

    def write(self, text: str) -> int:
        """Write where standard error is now."""
        return sys.stderr.write(text)

    def flush(self) -> None:
        """Flush what standard error is now."""
        sys.stderr.flush()


def _silence_libraries() -> None:
    """Keep the DICOM libraries from logging what they read: their messages quote values."""
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    logging.getLogger("highdicom").setLevel(logging.CRITICAL)
    pynetdicom_config.LOG_HANDLER_LEVEL = "none"
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    # whichever module a warning is attributed to: highdicom's about a person's name quotes the name
    warnings.filterwarnings("ignore", category=UserWarning)


def _with_trace(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Say where an exception came from, by type, file and line: its message may quote what a patient is called."""
    found = event.pop("exc_info", None)
    error = sys.exc_info()[1] if found is True else found
    lines: list[str] = []
    while isinstance(error, BaseException):
        places = traceback.extract_tb(error.__traceback__)
        if len(places) > 2 * _PLACES:  # of an endless recursion the beginning and the end
            places[_PLACES:-_PLACES] = []
        lines.append(type(error).__qualname__ + "".join(f"\n  {at.filename}:{at.lineno} {at.name}" for at in places))
        error = error.__cause__ or error.__context__
    if lines:
        event["exception"] = "\nfrom ".join(lines)
    return event


def _counted(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    tally.count(event)
    return event


def _without_identity(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    for key in FORBIDDEN & event.keys():
        event[key] = "[withheld]"
    return event
