"""The components of a checkpoint that go through the layout on their way into memory."""

from __future__ import annotations

import importlib
import json
from collections.abc import Container
from pathlib import Path

import torch
from torch import nn

from ..models import family_of
from ..parallel.ranks import Ranks
from ..sizes import DENOISERS
from .loader import CannotLoad, Loaded, WrongDegree, load_component, possible_degrees

_LIBRARIES = ("diffusers", "transformers")


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
    """The classes of the components with weights that ``model_index.json`` names, of diffusers and transformers."""
    index = json.loads((directory / "model_index.json").read_text())
    found: dict[str, type[nn.Module]] = {}
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and entry[0] in _LIBRARIES:
            cls = getattr(importlib.import_module(entry[0]), str(entry[1]), None)
            if isinstance(cls, type) and issubclass(cls, nn.Module):
                found[name] = cls
    return found
