"""A request's own copy of the pipeline.

The copy is shallow: configuration, tokenizers and processors are shared. Schedulers and guiders are copied, as they
keep the state of a denoising loop, and components stand behind boundaries. Whatever a pipeline writes to itself stays
with the fork.
"""

from __future__ import annotations

import copy

from diffusers import ConfigMixin, DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from .boundary import Boundary, Crossing
from .call import cross


def fork(pipeline: DiffusionPipeline, crossing: Crossing = cross) -> DiffusionPipeline:
    """A copy of ``pipeline`` whose calls to its components go through ``crossing``."""
    copied = copy.copy(pipeline)
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            # not setattr: the pipeline's own would write the change into the configuration that all forks share
            vars(copied)[name] = Boundary(component, name, crossing)
        elif isinstance(component, ConfigMixin):  # schedulers and guiders
            vars(copied)[name] = copy.deepcopy(component)
    return copied


def schedulers(pipeline: DiffusionPipeline) -> list[SchedulerMixin]:
    """The schedulers among the pipeline's components that take denoising steps."""
    found = [value for value in pipeline.components.values() if isinstance(value, SchedulerMixin)]
    return [scheduler for scheduler in found if hasattr(scheduler, "step")]
