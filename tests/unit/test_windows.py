"""Windows over an array: the same answer as whole, mirrored where asked, smaller where memory is short."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dicom_node.errors import ModelRefused
from dicom_node.manifest import Execution
from workers.windows import Runner, plans

CPU = torch.device("cpu")


def nothing(part: float) -> None:
    """A progress that nobody watches."""


def runner(forward, **execution) -> Runner:
    return Runner(forward, Execution(**execution), CPU, move=lambda device: None)


def doubled(batch):
    return torch.cat([batch, 2 * batch], dim=1)


ARRAY = np.random.default_rng(1).random((1, 19, 33, 26)).astype(np.float32)


@pytest.mark.parametrize("patch", [(), (8, 8, 8), (16, 40, 16), (19, 33, 26), (5, 33, 7)])
@pytest.mark.parametrize("blend", ["gaussian", "constant"])
def test_a_network_without_surroundings_gives_the_same_in_windows(patch, blend):
    answer = runner(doubled, patch=patch, blend=blend, batch=3)(ARRAY, 0, nothing)

    assert answer.shape == (2, 19, 33, 26)
    assert np.allclose(answer, np.concatenate([ARRAY, 2 * ARRAY]), atol=1e-5)


def test_windows_of_a_real_convolution_nearly_agree():
    torch.manual_seed(1)
    network = torch.nn.Conv3d(1, 2, 3, padding=1).eval()
    whole = runner(network)(ARRAY, 0, nothing)

    errors = {
        blend: np.abs(runner(network, patch=(12, 12, 12), blend=blend)(ARRAY, 0, nothing) - whole).mean()
        for blend in ("gaussian", "constant")
    }

    assert errors["gaussian"] < 0.02 * np.ptp(whole)
    assert errors["gaussian"] < errors["constant"], "a window's rim, where it lacks its surroundings, counts least"


def test_mirror_images_are_turned_back_before_they_are_averaged():
    def position(batch):
        ramp = torch.arange(batch.shape[-1], dtype=torch.float32).expand(batch.shape)
        return ramp + batch

    plain = runner(position)(ARRAY, 0, nothing)
    mirrored = runner(position, mirror=(2,))(ARRAY, 0, nothing)

    assert np.allclose(plain - ARRAY, np.arange(26), atol=1e-4)
    assert np.allclose(mirrored - ARRAY, 12.5, atol=1e-4), "the mean of a ramp and its mirror image is flat"


def test_progress_counts_windows_and_can_stop_between_two():
    seen = []
    runner(doubled, patch=(8, 8, 8))(ARRAY, 0, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert len(seen) > 10

    calls = []

    def counting(batch):
        calls.append(1)
        return batch

    def stop(part):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner(counting, patch=(8, 8, 8))(ARRAY, 0, stop)
    assert len(calls) == 1


def test_short_memory_makes_batches_and_then_windows_smaller():
    tried = []

    def hungry(batch):
        tried.append((batch.shape[0], *batch.shape[2:]))
        if batch.numel() > 40_000:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch

    large = np.random.default_rng(2).random((1, 64, 64, 96)).astype(np.float32)
    answer = runner(hungry, patch=(64, 64, 64), batch=2)(large, 0, nothing)

    assert np.allclose(answer, large, atol=1e-5)
    assert tried[0] == (2, 64, 64, 64)
    assert tried[1] == (1, 64, 64, 64)
    assert tried[-1] == (1, 32, 32, 32)


def test_where_nothing_fits_the_model_is_refused():
    def hungry(batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    with pytest.raises(ModelRefused, match="not enough memory"):
        runner(hungry, patch=(64, 64, 64))(np.zeros((1, 64, 64, 64), np.float32), 0, nothing)


def test_another_error_is_not_taken_for_short_memory():
    def broken(batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        runner(broken)(ARRAY, 0, nothing)


def test_the_cpu_comes_last_and_only_where_allowed():
    gpu = torch.device("cuda:0")

    with_fallback = list(plans(Execution(patch=(64, 64, 64), batch=4), gpu))
    without = list(plans(Execution(patch=(64, 64, 64), batch=4, cpu_fallback=False), gpu))

    assert [plan.batch for plan in without[:3]] == [4, 2, 1]
    assert with_fallback[-1].device == CPU
    assert with_fallback[:-1] == without
    assert all(plan.device == gpu for plan in without)


def test_a_network_of_another_size_is_refused():
    with pytest.raises(ModelRefused, match="answers"):
        runner(lambda batch: batch[..., ::2], patch=(8, 8, 8))(ARRAY, 0, nothing)
