"""What stands before a data set says what it is, whatever is put between to fill a block."""

from __future__ import annotations

import hashlib
import struct
from io import BytesIO

from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread

from dicom_node.digest import digesting
from dicom_node.landing import BLOCK
from dicom_node.part10 import dataset_digest, has_head, lead_length, preamble, read_origin, vouching
from tests.datasets import EXPLICIT, ct, encoded

CT = "1.2.840.10008.5.1.4.1.1.2"
PRIVATE_INFORMATION = b"\x02\x00\x02\x01OB\0\0"
uids = st.integers(1, 10**40).map(lambda number: f"1.2.{number}")


def digest_of(data: bytes) -> bytes:
    digest = digesting()
    digest.update(data)
    return digest.digest()


def written(data: bytes, uid: str = "1.2.3", title: str = "SCANNER", expected: int = 0) -> bytes:
    return vouching(preamble(CT, uid, EXPLICIT, title, expected=expected), digest_of(data)) + data


@given(uid=uids, title=st.text("ABC _9", min_size=1, max_size=16), size=st.integers(1, 10_000), off=st.integers(-9, 9))
def test_the_digest_is_found_whatever_was_expected(uid, title, size, off):
    data = bytes(size)

    file = BytesIO(written(data, uid, title, max(0, size + off)))

    assert has_head(file)
    file.seek(0)
    origin = read_origin(file)
    assert origin.digest == digest_of(data)
    assert (origin.transfer_syntax_uid, origin.source_application_entity_title) == (EXPLICIT, title.strip())
    assert file.read() == data
    file.seek(0)
    assert dataset_digest(file, digest_of(data).hex()) == digest_of(data).hex()


@given(
    uid=uids, title=st.text("ABC _9", min_size=1, max_size=16), size=st.integers(1, 10_000).map(lambda half: 2 * half)
)
def test_what_was_expected_fills_whole_blocks(uid, title, size):
    unfilled = preamble(CT, uid, EXPLICIT, title)
    file = written(bytes(size), uid, title, expected=size)

    assert len(file) % BLOCK == 0
    assert 0 <= len(file) - size - len(unfilled) < BLOCK
    assert len(file) - size == lead_length(size), "whatever its name is"
    elements = unfilled[144 : unfilled.index(PRIVATE_INFORMATION) + 8]
    assert elements in file, "nothing but how long the last is is different"


LONGEST = "1." + "2" * 62


def test_the_longest_names_have_room_before_the_data_set():
    assert len(preamble(LONGEST, LONGEST, LONGEST, "A" * 16)) == lead_length(0)


def test_pydicom_reads_it_as_it_reads_any():
    data = encoded(ct(), EXPLICIT)

    read = dcmread(BytesIO(written(data, ct().SOPInstanceUID, expected=len(data))))

    assert read == ct()
    assert len(read.file_meta.PrivateInformation) > 1000
    assert read.file_meta.PrivateInformation.endswith(digest_of(data))


def test_the_digest_of_an_earlier_version_is_read():
    earlier, data = preamble(CT, "1.2.3", EXPLICIT, "SCANNER"), b"data"
    sha256 = hashlib.sha256(data).digest()
    elements = earlier[144 : earlier.index(PRIVATE_INFORMATION) + 8] + struct.pack("<L", 32) + sha256

    origin = read_origin(BytesIO(earlier[:140] + struct.pack("<L", len(elements)) + elements + data))

    assert origin.digest == sha256
