from __future__ import annotations

import pytest

from dicom_node.devices import count_gpus, devices


@pytest.mark.parametrize(
    ("setting", "workers", "gpus", "expected"),
    [
        ("auto", 0, 0, ("auto",)),
        ("auto", 0, 3, ("cuda:0", "cuda:1", "cuda:2")),
        ("cuda", 2, 3, ("cuda:0", "cuda:1")),
        ("cuda", 3, 2, ("cuda:0", "cuda:1", "cuda:0")),
        ("cuda:1", 0, 3, ("cuda:1",)),
        ("cpu", 2, 3, ("cpu", "cpu")),
    ],
)
def test_each_gpu_gets_a_worker_unless_the_settings_say_otherwise(setting, workers, gpus, expected):
    assert devices(setting, workers, gpus=gpus) == expected


@pytest.mark.parametrize(("visible", "count"), [(None, 2), ("0", 1), ("", 0), ("-1", 0), ("0,1", 2), ("0,1,2", 2)])
def test_gpus_are_counted_as_cuda_would_see_them(tmp_path, visible, count):
    for card in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / card).mkdir()

    assert count_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}, tmp_path) == count


def test_a_machine_without_the_driver_has_none(tmp_path):
    assert count_gpus({}, tmp_path / "nothing") == 0
