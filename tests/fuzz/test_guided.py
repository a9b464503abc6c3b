"""The targets of `tests.fuzz.guided` without their guide: what it begins with, and that changed a little."""

from __future__ import annotations

import random
from contextlib import suppress
from io import BytesIO

import pytest

from dicom_node.part10 import preamble, read_origin
from tests.datasets import CT, EXPLICIT
from tests.fuzz.mutation import mutated_dataset
from tests.fuzz.targets import TARGETS, seeds


@pytest.mark.parametrize("target", TARGETS)
def test_whatever_is_read_is_read_or_refused_as_declared(target):
    chance = random.Random(target)
    for seed in seeds(target):
        TARGETS[target](seed)
        for _ in range(60):
            TARGETS[target](mutated_dataset(seed, chance))


@pytest.mark.parametrize("length", range(0, 60, 3))
def test_meta_information_that_ends_anywhere_is_none_of_the_nodes_or_is_read(length):
    whole = preamble(CT, "1.2.3", EXPLICIT, "SCANNER")
    cut = whole[:140] + length.to_bytes(4, "little") + whole[144 : 144 + length]

    with suppress(ValueError):  # not struct.error: the node would not start with such a file in its inbox
        read_origin(BytesIO(cut))
