from __future__ import annotations

import pytest

from dicom_node.results.drawing import written


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12834.2, "12834"),
        (3239.0, "3239"),
        (100.0, "100"),
        (14.21, "14.2"),
        (8.0, "8"),
        (0.26931, "0.269"),
        (0.0012, "0.0012"),
        (-842.3, "-842"),
        (0.0, "0"),
    ],
)
def test_numbers_are_written_as_people_write_them(value, text):
    assert written(value) == text
