"""The components of a checkpoint on their way into memory, through the layout where they are divided or fused."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Container
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from ..models import family_of
from ..parallel.ranks import Ranks
from ..sizes import DENOISERS
from .layout import Layout
from .loader import CannotLoad, Loaded, WrongDegree, layout_of, load_component, make, possible_degrees
from .pages import settle

log = logging.getLogger(__name__)

_LIBRARIES = ("diffusers", "transformers")


def load_pipeline(
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks,
    *,
    fused: bool,
    only: str | None = None,
) -> tuple[DiffusionPipeline, dict[str, Layout]]:
    """The pipeline in ``directory`` on ``device``, or this rank's part of it, and the layouts of its components.

    With ``only`` it has that one of its components with weights, and the others are ``None``. Raises ``CannotLoad``,
    and whatever ``from_pretrained`` does.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    names = None if only is None else (only,)
    # a whole model as diffusers loads it: where its weights lie in memory decides the last bits of its products
    divided = fused or ranks.size > 1
    own = load_known_components(directory, dtype, device, ranks, fused=fused, only=names) if divided else {}
    left_out = {
        name: make(cls, directory / name, dtype)  # without memory: constructors ask for their configurations
        for name, cls in component_classes(directory).items()
        if names and name not in names
    }
    modules = {name: loaded.module for name, loaded in own.items()} | left_out
    pipeline = _pipeline_class(directory).from_pretrained(directory, dtype=dtype, use_safetensors=True, **modules)
    if others := [name for name, module in modules.items() if pipeline.components.get(name) is not module]:
        raise CannotLoad(f"{type(pipeline).__name__} loads its {', '.join(others)} itself; serve it with --tp 1")
    pipeline.register_modules(**dict.fromkeys(left_out))
    pipeline.to(device)
    settle(part for part in pipeline.components.values() if isinstance(part, nn.Module))
    layouts = {
        name: own[name].layout if name in own else _layout(part, directory / name)
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module)
    }
    return pipeline, layouts


def _pipeline_class(directory: Path) -> type[DiffusionPipeline]:
    """diffusers' own class, where it has it: asked of the base class, it loads a given optional component once more."""
    name = json.loads((directory / "model_index.json").read_text()).get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, DiffusionPipeline) else DiffusionPipeline


def _layout(module: nn.Module, folder: Path) -> Layout:
    """By the names of the files; where the library makes tensors from others, by the module's own names for them."""
    try:
        return layout_of(module, folder)
    except (CannotLoad, FileNotFoundError) as reason:
        log.warning("the tensors of %s go by the names that the module has for them: %s", folder.name, reason)
        return Layout.whole(module)


def load_known_components(
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks,
    *,
    fused: bool,
    only: Container[str] | None = None,
) -> dict[str, Loaded]:
    """Every component of the pipeline in ``directory`` whose class has a family, by name; or ``only`` those of them.

    Raises ``CannotLoad`` where there are several ranks, and the pipeline's denoiser has no family or a component
    cannot be divided among so many.
    """
    classes = component_classes(directory)
    planned = {name: (cls, family) for name, cls in classes.items() if (family := family_of(cls)) is not None}
    whole = [cls.__name__ for name, cls in classes.items() if name in DENOISERS and name not in planned]
    if ranks.size > 1 and (whole or not planned):
        raise CannotLoad(f"there is no tensor-parallel plan for {', '.join(whole) or 'it'}; serve it with --tp 1")
    try:
        return {
            name: load_component(
                cls, directory / name, dtype=dtype, device=device, family=family, ranks=ranks, fused=fused
            )
            for name, (cls, family) in planned.items()
            if only is None or name in only
        }
    except WrongDegree as refused:
        possible = [possible_degrees(cls, directory / name, family) for name, (cls, family) in planned.items()]
        fit = ", ".join(map(str, sorted(set.intersection(*possible))))
        raise CannotLoad(f"it cannot be divided among {ranks.size} ranks; --tp can be {fit}") from refused


def component_classes(directory: Path) -> dict[str, type[nn.Module]]:
    """The classes of the components with weights that ``model_index.json`` names.

    They are of diffusers, of transformers, or of a pipeline's own module in diffusers.
    """
    index = json.loads((directory / "model_index.json").read_text())
    found: dict[str, type[nn.Module]] = {}
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
            library, class_name = entry
            home = importlib.import_module(library) if library in _LIBRARIES else None
            cls = getattr(home or getattr(diffusers.pipelines, library, None), class_name, None)
            if isinstance(cls, type) and issubclass(cls, nn.Module):
                found[name] = cls
    return found
