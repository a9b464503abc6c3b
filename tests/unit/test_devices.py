from __future__ import annotations

import pytest
import torch

from dicom_node.devices import count_gpus, devices
from workers.device import moved


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


def test_a_tensor_goes_to_a_gpu_from_pinned_memory_while_the_processor_goes_on(monkeypatch):
    """There is no GPU here: what torch is asked for at its edge, no more."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *where, **how: calls.append((where, how)) or self)

    moved(torch.zeros(2), torch.device("cuda:1"))
    moved(torch.zeros(2), torch.device("cpu"))

    assert calls == ["pinned", ((torch.device("cuda:1"),), {"non_blocking": True}), ((torch.device("cpu"),), {})]
