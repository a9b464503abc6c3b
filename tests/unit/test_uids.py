"""A UID is what pynetdicom makes of it, the first time and every time after."""

from __future__ import annotations

import pydicom.config
import pytest
from pydicom.uid import UID, ExplicitVRLittleEndian
from pynetdicom import pdu_items, presentation, utils

from dicom_node import uids, wire

VALUES = ["1.2.840.10008.1.1", b"1.2.840.10008.1.2.1", UID("1.2.3"), ExplicitVRLittleEndian, "", b"", None, "1.02.3",
          "abc", "1" * 65, b"1.2.3 ", 7, b"\xff"]  # fmt: skip


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    uids._known.clear()
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.IGNORE)  # as the node has it


def outcome(function, *arguments):
    try:
        made = function(*arguments)
    except Exception as error:
        return type(error), str(error)
    return type(made), made


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("flags", [(True, True, True), (False, False, True), (True, True, False)])
def test_it_is_what_pynetdicom_makes_of_it_also_the_second_time(value, flags):
    expected = outcome(utils.set_uid, value, "SOP Class UID", *flags)

    assert outcome(uids.set_uid, value, "SOP Class UID", *flags) == expected
    assert outcome(uids.set_uid, value, "SOP Class UID", *flags) == expected


def test_one_that_is_right_is_made_once_and_what_is_wrong_is_looked_at_again():
    assert uids.set_uid("1.2.3", "a") is uids.set_uid("1.2.3", "b")
    uids.set_uid("1.02.3", "a")

    assert list(uids._known) == ["1.2.3"]


def test_a_private_transfer_syntax_keeps_what_is_said_of_its_encoding():
    uids.set_uid("1.2.3.4", "a")
    private = UID("1.2.3.4")
    private.set_private_encoding(False, True)

    assert uids.set_uid(private, "a")._PRIVATE_TS_ENCODING == (False, True)


def test_a_sender_that_makes_up_uids_fills_no_memory():
    for number in range(10_000):
        uids.set_uid(f"1.2.{number}", "a")
        uids.set_uid(f"1.3.{number}" + " " * 60, "a")

    assert len(uids._known) <= 4096
    assert max(map(len, uids._known)) <= 64


def test_pynetdicom_asks_it():
    assert wire
    assert pdu_items.set_uid is presentation.set_uid is uids.set_uid
