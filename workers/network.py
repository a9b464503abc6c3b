"""A network from a file, made into a model: prepared, run, and its numbers given their meaning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dicom_node.errors import ModelRefused
from dicom_node.manifest import Manifest
from workers.answering import boxes_of, classified, detections, labelled, largest_only, probabilities_of, surest
from workers.prediction import Grid, Prediction, Progress
from workers.preparing import Prepared, prepare
from workers.windows import Forward, Runner


class NetworkModel:
    """A model whose manifest says all that its network needs: what goes in, how it is run, what comes out."""

    def __init__(
        self,
        manifest: Manifest,
        forward: Forward,
        device: torch.device,
        move: Callable[[torch.device], Any] = lambda device: None,
    ) -> None:
        """Run `forward` on `device`; `move(device)` brings its weights elsewhere."""
        self._manifest = manifest
        self._run = Runner(forward, manifest.execution, device, move=move)

    def __call__(self, grid: Grid, progress: Progress) -> Prediction:
        """Predict; raise ModelRefused where the network's answer is not what the manifest says."""
        settle(self._manifest.seed)
        prepared = prepare(grid, list(self._manifest.inputs.items()))
        outputs = self._manifest.outputs
        if outputs.detections or outputs.classifications:
            return self._listed(prepared, progress)
        return self._drawn(prepared, progress)

    def many(self, grids: Sequence[Grid], progress: Progress) -> list[Prediction]:
        """Predict for several grids in as few forwards as `execution.together` allows; each as if it were alone.

        Raises whatever one of them raises: then each is to be run alone.
        """
        settle(self._manifest.seed)
        size, outputs = self._manifest.execution.together.size, self._manifest.outputs
        prepared = [prepare(grid, list(self._manifest.inputs.items())) for grid in grids]
        if outputs.classifications:
            answers = self._run.raw_planes([one.array[:, 0] for one in prepared], progress, batch=size)
            return [Prediction(classes=classified(one, outputs), parameters=self._parameters()) for one in answers]
        planes = [one.array[:, number] for one in prepared for number in range(one.array.shape[1])]
        scores = iter(self._run.planes(planes, outputs.output, progress, batch=size))
        return [
            self._meant(one, np.stack([next(scores) for _ in range(one.array.shape[1])], axis=1)) for one in prepared
        ]

    def _drawn(self, prepared: Prepared, progress: Progress) -> Prediction:
        """Return masks and maps."""
        return self._meant(prepared, self._scores(prepared.array, progress))

    def _meant(self, prepared: Prepared, scores: npt.NDArray[np.float32]) -> Prediction:
        outputs = self._manifest.outputs
        if scores.shape[1:] != prepared.array.shape[1:]:
            raise ModelRefused(f"the network answers {scores.shape[1:]} to an array of {prepared.array.shape[1:]}")
        maps = {
            name: prepared.values_back(probabilities_of(scores, output.channel, outputs))
            for name, output in outputs.maps.items()
        }
        if not outputs.segments:
            return Prediction(maps=maps)
        answer = labelled(scores, outputs)
        layers = [prepared.labels_back(largest_only(layer, outputs)) for layer in answer.layers]
        return Prediction(
            labels=layers[0],
            overlapping=tuple(layers[1:]),
            certainty=answer.certainty,
            maps=maps,
            parameters=self._parameters(),
        )

    def _scores(self, array: npt.NDArray[np.float32], progress: Progress) -> npt.NDArray[np.float32]:
        """Return the channels over the array; a network of two dimensions sees plane after plane of its first axis."""
        outputs = self._manifest.outputs
        if not self._is_flat:
            return self._run(array, outputs.output, progress)
        planes = [
            self._run(array[:, number], outputs.output, _part(progress, number, array.shape[1]))
            for number in range(array.shape[1])
        ]
        return np.stack(planes, axis=1)

    def _listed(self, prepared: Prepared, progress: Progress) -> Prediction:
        """Return boxes and classes."""
        outputs = self._manifest.outputs
        planes: Sequence[npt.NDArray[np.float32]] = [prepared.array]
        if self._is_flat:
            planes = [prepared.array[:, number] for number in range(prepared.array.shape[1])]
        windows = []
        for number, plane in enumerate(planes):
            answers = self._run.raw(plane, _part(progress, number, len(planes)))
            windows += [((number, *place), answer) for place, answer in answers] if self._is_flat else answers
        classes = classified(windows[0][1], outputs) if outputs.classifications else {}
        found: tuple[Any, ...] = ()
        if outputs.detections and outputs.boxes is None:
            raise ModelRefused("outputs.boxes: say how the network writes its boxes: [outputs.boxes]")
        if outputs.detections and outputs.boxes is not None:
            boxes = boxes_of(windows, outputs.boxes, flat=self._is_flat)
            found = detections(surest(boxes, outputs), prepared, outputs)
        return Prediction(detections=found, classes=classes, parameters=self._parameters())

    @property
    def _is_flat(self) -> bool:
        return self._manifest.input.dimensions == 2 or self._manifest.execution.slicewise

    def _parameters(self) -> dict[str, str]:
        manifest = self._manifest
        made = {"seed": str(manifest.seed)}
        if manifest.execution.patch:
            made["patch"] = "x".join(str(side) for side in manifest.execution.patch)
        if manifest.outputs.activation == "sigmoid":
            made["threshold"] = f"{manifest.outputs.threshold:g}"
        return made


def settle(seed: int) -> None:
    """Make what follows repeatable, bit for bit where the hardware allows."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def _part(progress: Progress, number: int, count: int) -> Progress:
    return lambda part: progress((number + part) / count)
