"""MeshNet: dilated 3D convolutions, a few channels wide, at full resolution (Fedorov et al., IJCNN 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

_EPSILON = 1e-5


class MeshNet(nn.Module):
    """Layers of one dilation each, the last a 1x1x1 convolution to the classes.

    With `normalised` each channel is brought to mean 0 and variance 1 over the whole volume after each convolution.
    A layer's output replaces its input: at 256 x 256 x 256 voxels one activation takes 64 MiB for each channel.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        dilations: Sequence[int],
        activation: Literal["elu", "gelu"] = "elu",
        normalised: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv3d(channels if number else 1, channels, 3, padding=dilation, dilation=dilation, bias=not normalised)
            for number, dilation in enumerate(dilations)
        )
        self.output = nn.Conv3d(channels, classes, 1)
        self.activation, self.normalised = activation, normalised

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """Return logits `(n, classes, *axes)` of a volume `(n, 1, *axes)`."""
        on_processor = volume.device.type == "cpu"
        for layer in self.layers:
            if on_processor:  # its other way to dilate there takes several times as long
                volume = volume.contiguous(memory_format=torch.channels_last_3d)
            volume = layer(volume)
            if self.normalised:
                variance, mean = torch.var_mean(volume, dim=(2, 3, 4), keepdim=True, correction=0)
                volume = volume.sub_(mean).mul_(torch.rsqrt(variance + _EPSILON))
            volume = functional.elu_(volume) if self.activation == "elu" else torch.ops.aten.gelu_(volume)
        logits: torch.Tensor = self.output(volume)
        return logits
