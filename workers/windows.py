"""A network over an array of any size: whole or window by window, mirrored, and smaller when memory runs out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import structlog
import torch

from dicom_node.errors import ModelRefused
from dicom_node.manifest import Execution
from workers.device import moved
from workers.prediction import Progress

log = structlog.get_logger()

Answer = TypeVar("Answer")

Forward = Callable[[torch.Tensor], Any]
"""A network: a batch of shape `(n, channels, *axes)` in; a tensor, several, or a mapping of them out."""

_SMALLEST = 32  # voxels of a window's side
_MULTIPLE = 16  # a halved window's sides are multiples of this: networks halve their input several times
_SHARPNESS = 0.125  # standard deviation of the Gaussian, as part of the window (Isensee 2021)


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to run a network: windows of `patch` voxels (empty: whole), so many at a time, on a device."""

    patch: tuple[int, ...]
    batch: int
    device: torch.device


def plans(execution: Execution, device: torch.device) -> Iterator[Plan]:
    """Yield the ways to run, each needing less memory than the one before: fewer, smaller, at last on the CPU."""
    plan = Plan(execution.patch, execution.batch, device)
    while True:
        yield plan
        if plan.batch > 1:
            plan = replace(plan, batch=plan.batch // 2)
        elif any(side > _SMALLEST for side in plan.patch):
            halved = tuple(_halved(side) if side == max(plan.patch) else side for side in plan.patch)
            plan = replace(plan, patch=halved)
        else:
            break
    if device.type != "cpu" and execution.cpu_fallback:
        yield Plan(execution.patch, 1, torch.device("cpu"))


def _halved(side: int) -> int:
    return max(-(-side // 2 // _MULTIPLE) * _MULTIPLE, _SMALLEST)


class Runner:
    """Runs one network by its manifest's `[execution]`; raises what `progress` raises, between two windows."""

    def __init__(self, forward: Forward, execution: Execution, device: torch.device, *, move: Callable[..., Any]):
        """Run `forward`; `move(device)` brings its weights to another device."""
        self._forward = forward
        self._execution = execution
        self._device = device
        self._move = move

    def __call__(
        self, array: npt.NDArray[np.float32], output: int | str, progress: Progress
    ) -> npt.NDArray[np.float32]:
        """Return the network's answer over `array`, `(channels, *axes)`: float32 of shape `(classes, *axes)`.

        Raises:
            ModelRefused: there is not enough memory for the smallest window, or the answer is of another shape.
        """
        return self._with_less_and_less(lambda plan: self._blended(array, output, plan, progress))

    def raw(self, array: npt.NDArray[np.float32], progress: Progress) -> list[tuple[tuple[int, ...], Any]]:
        """Return for each window its first voxel and the network's answer as it is: for boxes and classes."""
        return self._with_less_and_less(lambda plan: list(self._each(array, plan, progress)))

    def planes(
        self, arrays: Sequence[npt.NDArray[np.float32]], output: int | str, progress: Progress, *, batch: int
    ) -> list[npt.NDArray[np.float32]]:
        """Return the network's answer over each of several arrays of one shape, `batch` of them at a time."""

        def run(plan: Plan) -> list[npt.NDArray[np.float32]]:
            stacks = self._stacks(arrays, plan, progress, lambda stack: self._mirrored(stack, output, plan))
            return [np.asarray(one.numpy()) for answers in stacks for one in answers]

        return self._with_less_and_less(run, self._execution.model_copy(update={"batch": batch}))

    def raw_planes(
        self, arrays: Sequence[npt.NDArray[np.float32]], progress: Progress, *, batch: int
    ) -> list[torch.Tensor]:
        """Return the network's one answer to each of several arrays of one shape as it is: for classes."""

        def run(plan: Plan) -> list[torch.Tensor]:
            stacks = self._stacks(arrays, plan, progress, lambda stack: chosen(self._run(stack, plan), 0))
            return [one[None] for answers in stacks for one in answers]

        return self._with_less_and_less(run, self._execution.model_copy(update={"batch": batch}))

    def _stacks(
        self,
        arrays: Sequence[npt.NDArray[np.float32]],
        plan: Plan,
        progress: Progress,
        run: Callable[[torch.Tensor], torch.Tensor],
    ) -> Iterator[torch.Tensor]:
        for start in range(0, len(arrays), plan.batch):
            group = arrays[start : start + plan.batch]
            answers = run(torch.from_numpy(np.stack(group)))
            if len(answers) != len(group):
                raise ModelRefused(f"the network answers {len(answers)} times to {len(group)} inputs")
            yield answers
            progress((start + len(group)) / len(arrays))

    def _with_less_and_less(self, run: Callable[[Plan], Answer], execution: Execution | None = None) -> Answer:
        for plan in plans(execution or self._execution, self._device):
            self._move(plan.device)
            try:
                with torch.inference_mode():
                    return run(plan)
            except (torch.OutOfMemoryError, MemoryError) as error:
                log.warning("model.memory", patch=plan.patch, batch=plan.batch, device=str(plan.device))
                refused: BaseException = error
            except RuntimeError as error:
                if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                    raise
                log.warning("model.memory", patch=plan.patch, batch=plan.batch, device=str(plan.device))
                refused = error
            finally:
                self._move(self._device)
            if plan.device.type == "cuda":
                torch.cuda.empty_cache()
        raise ModelRefused("there is not enough memory for the smallest window of the network") from refused

    def _blended(
        self, array: npt.NDArray[np.float32], output: int | str, plan: Plan, progress: Progress
    ) -> npt.NDArray[np.float32]:
        padded, inner = _padded(array, plan.patch)
        shape = padded.shape[1:]
        places = _places(shape, plan.patch, self._execution.overlap)
        patch = plan.patch or shape
        weight = _weight(patch, self._execution.blend) if len(places) > 1 else torch.ones(patch)
        total, weights = torch.zeros(()), torch.zeros(shape)
        done = 0
        for group in _groups(places, plan):
            answers = self._mirrored(_stacked(padded, group, patch), output, plan)
            if answers.shape[2:] != torch.Size(patch):
                raise ModelRefused(f"the network answers {tuple(answers.shape[2:])} to a window of {tuple(patch)}")
            if not done:
                total = torch.zeros((answers.shape[1], *shape))
            for place, answer in zip(group, answers, strict=True):
                where = tuple(slice(start, start + size) for start, size in zip(place, patch, strict=True))
                total[(slice(None), *where)] += answer * weight
                weights[where] += weight
            done += len(group)
            progress(done / len(places))
        return np.asarray((total / weights)[(slice(None), *inner)].numpy())

    def _each(
        self, array: npt.NDArray[np.float32], plan: Plan, progress: Progress
    ) -> Iterator[tuple[tuple[int, ...], Any]]:
        padded, _ = _padded(array, plan.patch)
        places = _places(padded.shape[1:], plan.patch, self._execution.overlap)
        for number, place in enumerate(places, start=1):
            batch = _stacked(padded, [place], plan.patch or padded.shape[1:])
            yield place, self._run(batch, plan)
            progress(number / len(places))

    def _mirrored(self, batch: torch.Tensor, output: int | str, plan: Plan) -> torch.Tensor:
        """Return the mean of the answers to the batch and to its mirror images, each turned back."""
        axes = self._execution.mirror
        mirrorings = itertools.chain.from_iterable(
            itertools.combinations(axes, count) for count in range(len(axes) + 1)
        )
        answers = []
        for mirroring in mirrorings:
            dimensions = [axis + 2 for axis in mirroring]
            answer = chosen(self._run(batch.flip(dimensions), plan), output)
            answers.append(answer.flip(dimensions).float().cpu())
        return torch.stack(answers).mean(dim=0) if len(answers) > 1 else answers[0]

    def _run(self, batch: torch.Tensor, plan: Plan) -> Any:
        execution = self._execution
        layout = torch.channels_last_3d if batch.ndim == 5 else torch.channels_last
        batch = moved(batch, plan.device)
        if execution.channels_last:
            batch = batch.contiguous(memory_format=layout)
        with torch.autocast(plan.device.type, enabled=execution.autocast and plan.device.type == "cuda"):
            return self._forward(batch)


def chosen(answer: Any, output: int | str) -> torch.Tensor:
    """Return one tensor of a network's answer; raise ModelRefused where it has none there."""
    if isinstance(answer, (list, tuple)) and isinstance(output, int) and 0 <= output < len(answer):
        answer = answer[output]
    elif isinstance(answer, Mapping):
        answer = answer.get(output) if output in answer or len(answer) > 1 else next(iter(answer.values()))
    if not isinstance(answer, torch.Tensor):
        raise ModelRefused(f"outputs.output: the network has no output {output!r}")
    return answer


# -- windows ------------------------------------------------------------------------------------------------------


def _padded(array: npt.NDArray[np.float32], patch: Sequence[int]) -> tuple[npt.NDArray[np.float32], tuple[slice, ...]]:
    """Return the array made at least as large as a window, evenly on both sides, and where it lies in it."""
    if not patch:
        return array, tuple(slice(0, size) for size in array.shape[1:])
    lacking = [max(side - size, 0) for side, size in zip(patch, array.shape[1:], strict=True)]
    before = [missing // 2 for missing in lacking]
    inner = tuple(slice(start, start + size) for start, size in zip(before, array.shape[1:], strict=True))
    if not any(lacking):
        return array, inner
    widths = [(0, 0), *((start, missing - start) for start, missing in zip(before, lacking, strict=True))]
    return np.pad(array, widths, constant_values=float(array.min())), inner


def _places(shape: Sequence[int], patch: Sequence[int], overlap: float) -> list[tuple[int, ...]]:
    """Return the first voxel of each window: evenly spread, overlapping by at least `overlap` of a window."""
    if not patch:
        return [(0,) * len(shape)]
    starts = []
    for size, side in zip(shape, patch, strict=True):
        count = int(np.ceil((size - side) / max(side * (1 - overlap), 1))) + 1
        starts.append(np.linspace(0, size - side, count).round().astype(int).tolist())
    return list(itertools.product(*starts))


def _weight(patch: Sequence[int], blend: str) -> torch.Tensor:
    """Return how much each voxel of a window counts: the middle most, as networks are least sure at the rim."""
    weight = torch.ones(tuple(patch))
    if blend == "gaussian":
        for axis, side in enumerate(patch):
            away = (torch.arange(side) - (side - 1) / 2) / (side * _SHARPNESS)
            shape = [1] * len(patch)
            shape[axis] = side
            weight = weight * torch.exp(-0.5 * away**2).reshape(shape)
    return weight.clamp_min(1e-4)


def _groups(places: Sequence[tuple[int, ...]], plan: Plan) -> Iterator[Sequence[tuple[int, ...]]]:
    for start in range(0, len(places), plan.batch):
        yield places[start : start + plan.batch]


def _stacked(array: npt.NDArray[np.float32], places: Sequence[tuple[int, ...]], patch: Sequence[int]) -> torch.Tensor:
    cuts = [
        array[(slice(None), *(slice(start, start + side) for start, side in zip(place, patch, strict=True)))]
        for place in places
    ]
    return torch.from_numpy(np.stack(cuts))
