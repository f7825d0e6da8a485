"""An adapter on this rank: of every layer that it changes, this rank's part of the two factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..parallel.layers import GatheredColumnLinear, RowParallelLinear
from ..sizes import DENOISERS
from ..weights.fuse import FusedPart
from ..weights.layout import Layout
from .files import AdapterFile, LowRank

BESIDE = (nn.Linear, RowParallelLinear, GatheredColumnLinear, FusedPart, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers beside which a term can be computed: exactly these classes, as others are not always called."""


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """What an adapter adds to one layer: ``scale * up @ down``.

    ``weight`` is the name of the layer's weight in the checkpoint. ``down`` and ``up`` are this rank's: their product
    is this rank's part of the weight's change. ``whole_up`` is of all output features, where the layer gives every rank
    all of them.
    """

    weight: str
    down: torch.Tensor
    up: torch.Tensor
    whole_up: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(slots=True, eq=False)
class Adapter:
    """``terms`` by component and layer. A request that names it has it in ``components``."""

    nickname: str
    terms: dict[str, dict[str, Term]] = field(default_factory=dict)
    components: frozenset[str] = frozenset()

    def cannot_be_beside(self, components: Mapping[str, nn.Module], targets: list[str]) -> list[str]:
        """Layers that only a merge can change."""
        return [
            f"{component}.{path}"
            for component in targets
            for path in self.terms.get(component, ())
            if type(components[component].get_submodule(path)) not in BESIDE
        ]


def placed(
    file: AdapterFile, nickname: str, components: Mapping[str, nn.Module], layouts: Mapping[str, Layout]
) -> Adapter:
    """The adapter of ``file`` on this rank; what it has for a denoiser, for every denoiser in which it fits."""
    adapter = Adapter(nickname)
    for component, layers in file.layers.items():
        for other in [name for name in layouts if name in DENOISERS and component in DENOISERS] or [component]:
            if other == component or _fits(layers, layouts[other]):
                module, layout = components[other], layouts[other]
                adapter.terms[other] = {path: _term(pair, path, module, layout) for path, pair in layers.items()}
    return adapter


def _fits(layers: Mapping[str, LowRank], layout: Layout) -> bool:
    for path, pair in layers.items():
        name = layout.checkpoint_name(f"{path}.weight")
        if name is None or layout[name].shape[:2] != (pair.up.shape[0], pair.down.shape[1]):
            return False
    return True


def _term(pair: LowRank, path: str, module: nn.Module, layout: Layout) -> Term:
    name = layout.checkpoint_name(f"{path}.weight")
    assert name is not None, "the file was checked"
    where = layout.local(name).device
    down, up = layout.factors(name, pair.down.to(where), pair.up.to(where))
    whole = pair.up.to(where) if type(module.get_submodule(path)) is GatheredColumnLinear else up
    return Term(name, down, up, whole, pair.scale)
