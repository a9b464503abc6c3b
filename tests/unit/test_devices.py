from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

import pytest
import torch

from dicom_node.devices import count_gpus, devices
from dicom_node.errors import ModelRefused
from workers import device
from workers.device import choose_device, moved


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


@pytest.mark.parametrize(
    ("setting", "driver", "found", "chosen"),
    [
        ("cpu", True, True, "cpu"),
        ("auto", False, False, "cpu"),
        ("auto", True, False, "cpu"),
        ("auto", True, True, "cuda"),
        ("cuda:1", True, True, "cuda:1"),
    ],
)
def test_a_setting_becomes_a_device_that_is_there(monkeypatch, setting, driver, found, chosen):
    monkeypatch.setattr(device, "_has_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)

    assert choose_device(setting) == chosen


@pytest.mark.parametrize(("driver", "found"), [(False, False), (True, False)])
def test_a_gpu_that_is_asked_for_and_not_there_is_refused(monkeypatch, driver, found):
    monkeypatch.setattr(device, "_has_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)

    with pytest.raises(ModelRefused, match=r"node\.device is cuda:0"):
        choose_device("cuda:0")


def test_a_contained_model_that_needs_no_torch_does_not_wait_for_it():
    script = """
        import sys
        import dicom_node.catalogue, workers.contained, workers.passing, workers.runtimes.python
        from workers.device import choose_device
        print(choose_device("cpu"), "torch" in sys.modules)
    """

    done = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["cpu", "False"]
