"""Finds the model's layers for the pairs of a file, and checks that the pairs fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod

from diffusers import DiffusionPipeline
from torch import nn

from ..weights.checkpoint.fuse import FusedPart
from .convert import Converted, NotConverted, convert
from .names import LayerRef, Shapes, locate
from .pairs import LeftOut, Pair, refused
from .targets import Targets, by_sd3, underscored
from .whole import Whole

_FUSED = re.compile(r"(qkv|linear1|to_kv|to_added_qkv)$")
"""Layers that others are parts of, in files that have both."""

ABSENT = "layers that the model does not have, or that cannot be converted to its names"


def match_layers(
    pairs: Mapping[str, Pair], pipeline: DiffusionPipeline, shapes: Shapes, left: LeftOut
) -> list[tuple[LayerRef, Converted]]:
    """The pairs with the layers of the model that they change; a layer comes twice if a file names it twice.

    Raises ``InvalidRequest`` for layers that the model does not have, unless these may be left out, or that do not fit.
    Names that are the model's own need no converter, and some converters do not know them.
    """
    named = _in_model_names(pairs, pipeline, shapes, left)
    matched = [(where, pair) for name, pair in named if (where := locate(name, shapes)) is not None]
    if absent := [(name, pair) for name, pair in named if locate(name, shapes) is None]:
        own = dict.fromkeys(layer for _, pair in absent for layer in sorted(pair.layers))
        left.out(_absent(len(absent)), [name for name, _ in absent] if left.strict else own)
    modules = pipeline.components
    unfit = [fault for where, pair in matched if (fault := _fault(where, pair, modules[where[0]], shapes))]
    if unfit:
        raise refused(f"{len(unfit)} of its layers do not fit the model's", unfit)
    return matched


def _in_model_names(
    pairs: Mapping[str, Pair], pipeline: DiffusionPipeline, shapes: Shapes, left: LeftOut
) -> list[tuple[str, Converted]]:
    own = {name: Converted(pair.down, pair.up, frozenset({name})) for name, pair in pairs.items()}
    absent = [name for name in own if locate(name, shapes) is None]
    if not absent:
        return list(own.items())
    named = underscored(absent, shapes)
    if len(named) == len(absent):
        return _cut(pairs, named) + [(name, pair) for name, pair in own.items() if name not in named]
    if sd3 := by_sd3({name: pairs[name].up.shape[0] for name in absent}, pairs, shapes):
        return _cut(pairs, sd3) + [(name, pair) for name, pair in own.items() if name not in sd3]
    try:
        return list(convert(pairs, pipeline).items())
    except NotConverted as error:
        if (found := _by_groups(pairs, absent, pipeline, shapes)) is not None:
            return [(name, pair) for name, pair in own.items() if name not in absent] + found
        names = error.names or absent
    lost = [name for name in names if name in pairs]
    if left.strict or not lost:
        raise refused(_absent(len(names)), names)
    left.out(_absent(len(lost)), lost)
    return _in_model_names({name: pair for name, pair in pairs.items() if name not in lost}, pipeline, shapes, left)


def _cut(pairs: Mapping[str, Pair], targets: Targets) -> list[tuple[str, Converted]]:
    """Each layer's rows under the model's names."""
    return [
        (".".join(target.where), Converted(pair.down, pair.up if target.rows is None else pair.up[target.rows], of))
        for name, ones in targets.items()
        for pair, of in ((pairs[name], frozenset({name})),)
        for target in ones
    ]


def _by_groups(
    pairs: Mapping[str, Pair], absent: list[str], pipeline: DiffusionPipeline, shapes: Shapes
) -> list[tuple[str, Converted]] | None:
    """Fused layers and others apart, as no converter knows a file that has both of a layer."""
    fused = {name: pairs[name] for name in absent if _FUSED.search(name)}
    others = {name: pairs[name] for name in absent if name not in fused}
    groups = [group for group in (fused, others) if group]
    if len(groups) == 1 and len(absent) == len(pairs):
        return None
    try:
        found = [item for group in groups for item in convert(group, pipeline).items()]
    except NotConverted:
        return None
    return found if all(locate(name, shapes) is not None for name, _ in found) else None


def _absent(number: int) -> str:
    return f"it has {number} {ABSENT}"


def _is_known(module: nn.Module) -> bool:
    """True if merging equals dynamic application for this layer; false for grouped convolutions."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.groups == 1
    return isinstance(module, nn.Linear | FusedPart)


def _fault(where: LayerRef, pair: Converted, module: nn.Module, shapes: Shapes) -> str | None:
    component, layer = where
    shape, rank = shapes[component][layer], pair.down.shape[0]
    if not _is_known(module.get_submodule(layer)):
        return f"{component}.{layer}: it is neither linear nor a convolution without groups"
    if tuple(pair.down.shape) != (rank, *shape[1:]) or tuple(pair.up.shape) != (
        shape[0],
        rank,
        *(1 for _ in shape[2:]),
    ):
        given = f"{list(pair.up.shape)} and {list(pair.down.shape)}"
        return f"{component}.{layer}: {given}, for a weight of {list(shape)}"
    return None


def fault_of(whole: Whole, where: LayerRef, rows: int, shapes: Shapes) -> str | None:
    """Why a change of ``rows`` rows of a whole weight or bias is not one of the model's layer there, if it is not."""
    component, layer = where
    shape = shapes[component][layer]
    shape = shape if whole.parameter == "weight" else shape[:1]
    given = (rows, *whole.shape[1:])
    if rows == shape[0] and prod(given[1:]) == prod(shape[1:]):
        return None
    return f"{component}.{layer}: a {whole.kind} of {list(given)}, for a {whole.parameter} of {list(shape)}"
