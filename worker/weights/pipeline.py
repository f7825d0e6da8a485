"""The components of a checkpoint that go through the layout on their way into memory."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import torch
from torch import nn

from ..models import family_of
from ..parallel.ranks import Ranks
from ..sizes import DENOISERS
from .loader import CannotLoad, Loaded, load_component

_LIBRARIES = ("diffusers", "transformers")


def load_known_components(
    directory: Path, dtype: torch.dtype, device: torch.device, ranks: Ranks, *, fused: bool
) -> dict[str, Loaded]:
    """Every component of the pipeline in ``directory`` whose class has a family, by name.

    Raises ``CannotLoad`` where the pipeline's denoiser has none and there are several ranks.
    """
    loaded = {}
    for name, cls in component_classes(directory).items():
        family = family_of(cls)
        if family is not None:
            loaded[name] = load_component(
                cls, directory / name, dtype=dtype, device=device, family=family, ranks=ranks, fused=fused
            )
        elif ranks.size > 1 and name in DENOISERS:
            raise CannotLoad(f"there is no tensor-parallel plan for {cls.__name__}; serve it with --tp 1")
    return loaded


def component_classes(directory: Path) -> dict[str, type[nn.Module]]:
    """The classes of the components with weights that ``model_index.json`` names, of diffusers and transformers."""
    index = json.loads((directory / "model_index.json").read_text())
    found: dict[str, type[nn.Module]] = {}
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and entry[0] in _LIBRARIES:
            cls = getattr(importlib.import_module(entry[0]), str(entry[1]), None)
            if isinstance(cls, type) and issubclass(cls, nn.Module):
                found[name] = cls
    return found
