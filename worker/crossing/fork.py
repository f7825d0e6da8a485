"""The fork: a request's own shallow copy of the pipeline.

Schedulers and guiders are deep-copied, because they hold the state of a denoising loop. The attributes of tokenizers
and processors and the pipeline's tables are copied, because some pipelines write to them. Boundaries replace the other
components. Inner pipelines are copied too and share the copy's components. Whatever a pipeline writes to itself or to a
component stays in the fork.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn
from transformers.utils import PushToHubMixin

from .boundary import Boundary, Crossing
from .call import cross
from .changes import Changes
from .exact_type import look_through_boundaries
from .execution_device import know_execution_devices
from .facts import OF_PIPELINES, Facts
from .module_state import is_stateful

_PROCESSORS = (VaeImageProcessor, PushToHubMixin)
"""diffusers' processors, which pipelines do not list as components, and transformers', which hold further ones."""


class Fork:
    """A copy of ``pipeline`` for one call in a ``with`` block; its components' calls go through ``crossing``.

    ``watches_all`` is for pipelines that keep state where no boundary sees it. ``facts`` are shared by all forks.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        crossing: Crossing = cross,
        *,
        watches_all: bool = False,
        facts: Facts | None = None,
    ) -> None:
        copies: dict[int, Any] = {}  # of processors, by the originals' ids, because one may have several names
        self._pipeline = _copied(pipeline, copies)
        self._pipeline.__class__ = _knowing(type(pipeline))  # type: ignore[arg-type]  # every class is hashable
        components = {name: getattr(pipeline, name) for name in self._pipeline.components}
        modules = [part for part in components.values() if isinstance(part, nn.Module)]
        self.changes = Changes(modules if watches_all else (), facts)
        own = vars(self._pipeline)
        own["_shared_facts"] = partial(self._fact, pipeline)
        for name, component in components.items():
            if isinstance(component, nn.Module):
                # not setattr: the pipeline's would write the change into the configuration, which all forks share
                own[name] = Boundary(component, name, crossing, self.changes)
            elif isinstance(component, ConfigMixin):  # schedulers and guiders
                own[name] = _deep_copy(component)
            elif is_stateful(component):
                own[name] = _with_own_attributes(component, copies)
        _copy_inner(self._pipeline, {id(part): own[name] for name, part in components.items()}, copies)

    def __enter__(self) -> DiffusionPipeline:
        self.changes.show()
        return self._pipeline

    def __exit__(self, *_: object) -> None:
        if self.changes.shown:
            self.changes.hide()

    def _fact(self, shared: DiffusionPipeline, name: str, own: Callable[[], Any]) -> Any:
        return self.changes.pipeline_fact(shared, own, name)


@functools.cache
def _knowing(cls: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """``cls``, but its devices are the shared pipeline's, which are known, and it reads its signature once."""

    def reading(name: str) -> property:
        walk = getattr(cls, name).fget
        return property(lambda fork: fork._shared_facts(name, partial(walk, fork)))

    keys = cls._get_signature_keys(cls)

    def signature_keys(own: type[DiffusionPipeline], of: Any) -> tuple[list[str], list[str]]:
        required, optional = keys if isinstance(of, own) else cls._get_signature_keys(of)
        return list(required), list(optional)

    properties = [name for name in OF_PIPELINES if isinstance(getattr(cls, name), property)]
    known: dict[str, Any] = {name: reading(name) for name in properties} | {
        "_get_signature_keys": classmethod(signature_keys)
    }
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), names | known)


def schedulers(pipeline: DiffusionPipeline) -> list[SchedulerMixin]:
    """The schedulers among the pipeline's components that take denoising steps."""
    found = [value for value in pipeline.components.values() if isinstance(value, SchedulerMixin)]
    return [scheduler for scheduler in found if hasattr(scheduler, "step")]


def _copied(pipeline: DiffusionPipeline, copies: dict[int, Any]) -> DiffusionPipeline:
    """A shallow copy with its own tables and processors."""
    look_through_boundaries(type(pipeline))
    know_execution_devices(type(pipeline))
    copied = copy.copy(pipeline)
    own = vars(copied)
    own |= {name: value.copy() for name, value in own.items() if type(value) in (dict, list, set)}
    own |= {name: _with_own_attributes(value, copies) for name, value in own.items() if _is_processor(value)}
    return copied


def _copy_inner(pipeline: DiffusionPipeline, replaced: dict[int, Any], copies: dict[int, Any]) -> None:
    """Copy the pipelines inside ``pipeline``; ``replaced`` maps the ids of its components to their replacements."""
    for name, inner in vars(pipeline).items():
        if isinstance(inner, DiffusionPipeline):
            copied = _copied(inner, copies)
            vars(copied).update({part: replaced.get(id(value), value) for part, value in inner.components.items()})
            vars(pipeline)[name] = copied


def _deep_copy(component: ConfigMixin) -> Any:
    """Tensors among the attributes are cloned first, which takes a tenth of the time that their deep copies take."""
    tensors = (value for value in vars(component).values() if type(value) is torch.Tensor and not value.requires_grad)
    return copy.deepcopy(component, {id(tensor): tensor.clone() for tensor in tensors})


def _is_processor(value: Any) -> bool:
    return isinstance(value, _PROCESSORS) and not isinstance(value, nn.Module)


def _with_own_attributes(component: Any, copies: dict[int, Any]) -> Any:
    """A copy of a tokenizer or processor. The class's own copying is not used, as it may read files again."""
    if id(component) in copies:
        return copies[id(component)]
    copies[id(component)] = copied = object.__new__(type(component))
    attributes = vars(component)
    tables = {name: value.copy() for name, value in attributes.items() if type(value) is dict and len(value) < 100}
    parts = {name: _with_own_attributes(value, copies) for name, value in attributes.items() if _is_processor(value)}
    vars(copied).update(attributes | tables | parts)
    return copied
