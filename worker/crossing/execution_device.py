"""diffusers' ``get_module_execution_device`` in pipelines' code knows the devices of boundaries.

It walks twice over all modules of a component in search of offloading hooks, behind a boundary at many times the cost.
So the Python modules that define a pipeline get one that asks a boundary's component, once for all requests.
"""

from __future__ import annotations

import sys

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import get_module_execution_device
from torch import nn

from .boundary import Boundary, found_of

_NAME = get_module_execution_device.__name__


def execution_device(module: nn.Module | Boundary) -> torch.device:
    """The device of the inputs of ``module``."""
    known = found_of(module, get_module_execution_device) if type(module) is Boundary else None
    device: torch.device = get_module_execution_device(module) if known is None else known
    return device


def know_execution_devices(pipeline: type[DiffusionPipeline]) -> None:
    """Replace the function in the Python modules that define ``pipeline``, its bases and its mixins."""
    for cls in pipeline.__mro__:
        names = vars(sys.modules[cls.__module__])
        if cls not in DiffusionPipeline.__mro__ and names.get(_NAME) is get_module_execution_device:
            names[_NAME] = execution_device
