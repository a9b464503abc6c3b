from __future__ import annotations

import pytest

from dicom_node.results.drawing import written
from dicom_node.results.typeface import font, undrawable


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


@pytest.mark.parametrize(
    "text",
    ["Nicht zur Diagnose: ärztlich nicht geprüft (µm², 5 °C)", "Не для диагностики", "Όχι για διάγνωση"],
)
def test_a_site_s_own_words_can_be_drawn(text):
    assert undrawable(text) == ""


def test_what_no_font_has_is_named():
    cuneiform = "\U00012000\U00012001"

    assert undrawable(f"AI {cuneiform} AI") == cuneiform
    assert font(cuneiform, 20).getname()[0] == "Roboto"
