"""Loads the components of a checkpoint, through the layout where they are divided or fused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from ...parallel.families import family_of
from ...parallel.plan import Family
from ...parallel.ranks import Ranks
from ...pipelines.components import DENOISERS
from .components import Component, components, inspect, pipeline_class
from .files import WeightFiles
from .layout import Layout
from .loader import CannotLoad, LoadedComponent, WrongDegree, layout_of, load_component, make, possible_degrees
from .single_file import SingleFile, saved_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedPipeline:
    """A pipeline and the layouts of its components. ``whole`` says which parts every rank has whole, and why."""

    pipeline: DiffusionPipeline
    layouts: dict[str, Layout]
    whole: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def load_pipeline(
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks,
    *,
    fused: bool,
    only: str | None = None,
    variant: str | None = None,
    single_file: SingleFile | None = None,
) -> LoadedPipeline:
    """The pipeline in ``directory`` on ``device``, or this rank's part of it.

    The components in ``single_file``, whose base is ``directory``, come from it. With ``only``, the pipeline has that
    one component with weights, and the others are ``None``. Raises ``CannotLoad``, ``StartFailed``, and what
    ``from_pretrained`` raises.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    sources = Sources.of(directory, variant, single_file)
    for component in sources.on_disk():
        inspect(component)
    models = {name: c for name, c in sources.components.items() if issubclass(c.cls, nn.Module)}
    # made without memory, because pipelines' constructors read their configurations
    others = {name: make(c.cls, c.folder, dtype) for name, c in models.items() if only not in (None, name)}
    chosen = {name: component for name, component in models.items() if name not in others}
    own = _load_components(sources, chosen, dtype, device, ranks, fused=fused)
    given = {name: loaded.module for name, loaded in own.items()} | others
    pipeline = _from_pretrained(directory, dtype, variant, sources, given)
    pipeline.register_modules(**dict.fromkeys(others))
    pipeline.to(device)
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    layouts = {
        name: own[name].layout if name in own else _layout(part, models.get(name)) for name, part in parts.items()
    }
    return LoadedPipeline(pipeline, layouts, {name: _whole(name, part, own) for name, part in parts.items()})


def _from_pretrained(
    directory: Path, dtype: torch.dtype, variant: str | None, sources: Sources, given: Mapping[str, nn.Module]
) -> DiffusionPipeline:
    """diffusers' own loader, with the modules ``given``. Raises ``CannotLoad`` where the pipeline ignores one."""
    pipeline = pipeline_class(directory).from_pretrained(
        directory,
        dtype=dtype,
        use_safetensors=True,
        variant=variant if variant is not None and any(c.variant for c in sources.on_disk()) else None,
        **given,
        **dict.fromkeys(sources.left_out),
    )
    if ignored := [name for name, module in given.items() if pipeline.components.get(name) is not module]:
        raise CannotLoad(f"{type(pipeline).__name__} loads its {', '.join(ignored)} itself; serve it with --tp 1")
    return pipeline


@dataclass(frozen=True, slots=True)
class Sources:
    """Where each component comes from: its folder or a single file. Components in ``left_out`` are not loaded."""

    components: Mapping[str, Component]
    single_file: SingleFile | None
    left_out: list[str]

    @classmethod
    def of(cls, directory: Path, variant: str | None, single_file: SingleFile | None) -> Sources:
        found = components(directory, variant)
        left_out = [name for name, component in found.items() if single_file and single_file.leaves_out(component)]
        return cls({name: c for name, c in found.items() if name not in left_out}, single_file, left_out)

    def in_file(self, component: Component) -> bool:
        return self.single_file is not None and self.single_file.has(component)

    def on_disk(self) -> list[Component]:
        """The components that are loaded from their folders."""
        return [component for component in self.components.values() if not self.in_file(component)]

    def load(self, component: Component, dtype: torch.dtype) -> nn.Module | None:
        """The whole component of the single file; ``None`` where it is not in there."""
        return self.single_file.load(component, dtype) if self.single_file and self.in_file(component) else None


def _whole(name: str, part: nn.Module, own: Mapping[str, LoadedComponent]) -> Mapping[str, str]:
    """Which parts of a component every rank has whole, and why; ``""`` stands for all of it."""
    if name in own and family_of(type(part)) is not None:
        return own[name].whole
    return {"": f"there is no tensor-parallel plan for {type(part).__name__}"}


def _layout(module: nn.Module, component: Component | None) -> Layout:
    """The layout by the files' names, or by the module's own where its library computes tensors from others."""
    try:
        with WeightFiles(component.files if component is not None else []) as files:
            return layout_of(module, files)
    except (CannotLoad, FileNotFoundError) as reason:
        name = component.name if component is not None else type(module).__name__
        log.warning("the tensors of %s go by the names that the module has for them: %s", name, reason)
        return Layout.whole(module)


def _load_components(
    sources: Sources,
    chosen: Mapping[str, Component],
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks,
    *,
    fused: bool,
) -> dict[str, LoadedComponent]:
    """The components that diffusers does not load itself: divided or fused ones, and those of a single file.

    diffusers loads whole components, because the alignment of weights in memory decides the last bits of products.
    Raises ``CannotLoad`` where there are several ranks, and the pipeline's denoiser has no family or cannot be divided
    among so many.
    """
    planned = planned_components(sources.components) if fused or ranks.size > 1 else {}
    if ranks.size > 1:
        _check_denoisers(sources.components, planned)
    loaded: dict[str, LoadedComponent] = {}
    try:
        for name, component in chosen.items():
            module = sources.load(component, dtype)
            if name in planned:
                loaded[name] = _load_planned(component, module, planned[name], dtype, device, ranks, fused=fused)
            elif module is not None:
                tensors = saved_tensors(module)
                settled = module.to(device).requires_grad_(False)
                loaded[name] = LoadedComponent(settled, layout_of(settled, tensors))
    except WrongDegree as refused:
        possible = [possible_degrees(c.cls, c.folder, planned[name]) for name, c in chosen.items() if name in planned]
        fit = ", ".join(map(str, sorted(set.intersection(*possible))))
        raise CannotLoad(f"{refused.why}; --tp can be {fit}") from refused
    return loaded


def _load_planned(
    component: Component,
    whole: nn.Module | None,
    family: Family,
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks,
    *,
    fused: bool,
) -> LoadedComponent:
    with ExitStack() as stack:
        return load_component(
            component.cls,
            component.folder,
            dtype=dtype,
            device=device,
            family=family,
            ranks=ranks,
            fused=fused,
            tensors=stack.enter_context(WeightFiles(component.files)) if whole is None else saved_tensors(whole),
        )


def planned_components(found: Mapping[str, Component]) -> dict[str, Family]:
    """The families of the components whose classes have one."""
    families = {name: family_of(component.cls) for name, component in found.items()}
    return {name: family for name, family in families.items() if family is not None}


def _check_denoisers(found: Mapping[str, Component], planned: Mapping[str, Family]) -> None:
    for name, component in found.items():
        if name in DENOISERS and name not in planned:
            what = f"its {name} ({component.cls.__name__})"
            raise CannotLoad(f"there is no tensor-parallel plan for {what}; serve it with --tp 1")
    if not planned:
        raise CannotLoad("there is no tensor-parallel plan for any of its components; serve it with --tp 1")
