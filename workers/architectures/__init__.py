"""Networks that weights fill: the node's own by name, and those of MONAI as `monai.NAME`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from dicom_node.errors import ModelRefused

_OWN = {"meshnet": "workers.architectures.meshnet:MeshNet"}  # name -> "module:class"


def build(name: str, arguments: Mapping[str, Any]) -> torch.nn.Module:
    """Return the network `name`, made with `arguments`; raise ModelRefused where there is none, or they do not fit."""
    module, _, attribute = _OWN.get(name, "").partition(":")
    if name.startswith("monai."):
        module, attribute = "monai.networks.nets", name.removeprefix("monai.")
    if not module:
        known = ", ".join([*sorted(_OWN), "monai.NAME"])
        raise ModelRefused(f"architecture.name: no network {name!r} (there is: {known})")
    try:
        made = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ModelRefused(f"architecture.name: {name} needs pip install 'dicom-node[monai]'") from error
    except AttributeError as error:
        raise ModelRefused(f"architecture.name: {module} has no {attribute!r}") from error
    try:
        network: torch.nn.Module = made(**arguments)
    except TypeError as error:
        raise ModelRefused(f"architecture.arguments: {error}") from error
    return network
