"""Which layers of the model the pairs of a file are of, and whether they fit there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from diffusers import DiffusionPipeline
from torch import nn

from ..sizes import DENOISERS
from ..weights.fuse import FusedPart
from ..weights.layout import Layout
from .convert import Converted, NotConverted, convert
from .pairs import Pair, refused

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Of the whole weights, by component and layer."""

Place = tuple[str, str]
"""A component and the name of a layer in it."""

_PEFT_MODEL = "base_model.model."
_FOREIGN = "diffusion_model."  # before the denoiser's layers, as ComfyUI and ai-toolkit write it
_NESTED_TEXT = "text_model."  # which transformers' CLIPTextModel no longer has


def weight_shapes(layouts: Mapping[str, Layout]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The whole weights' shapes by component and layer, however they are divided and fused on this rank."""
    return {component: dict(_weights(layout)) for component, layout in layouts.items()}


def _weights(layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    for entry in layout:
        layer, _, kind = (entry.own or entry.tensor).rpartition(".")  # a fused tensor is no layer's own
        if kind == "weight":
            yield layer, entry.shape


def split_name(name: str, shapes: Shapes) -> Place:
    """The component and the layer that a name in a file means, if it is one that diffusers or peft gives."""
    path = name.removeprefix(_PEFT_MODEL)
    component, _, rest = path.partition(".")
    if component in shapes:
        return component, rest.removeprefix(_PEFT_MODEL)
    denoiser = next((found for found in DENOISERS if found in shapes), "")
    return denoiser, path.removeprefix(_FOREIGN)


def place(pairs: Mapping[str, Pair], pipeline: DiffusionPipeline, shapes: Shapes) -> dict[Place, Converted]:
    """The pairs by their places. Raises ``InvalidRequest`` for layers that the model does not have, or that do not fit.

    Names that are the model's own need no converter, and some converters do not know them.
    """
    found = {name: Converted(pair.down, pair.up, frozenset({name})) for name, pair in pairs.items()}
    absent = [name for name in found if _locate(name, shapes) is None]
    if absent:
        try:
            found = convert(pairs, pipeline)
        except NotConverted as error:
            raise _absent(error.names or absent) from None
    if absent := [name for name in found if _locate(name, shapes) is None]:
        raise _absent(absent)
    placed = {where: pair for name, pair in found.items() if (where := _locate(name, shapes)) is not None}
    if len(placed) < len(found):
        counted = Counter(_locate(name, shapes) for name in found)
        raise refused("it has a layer twice", (name for name in found if counted[_locate(name, shapes)] > 1))
    modules = pipeline.components
    unfit = [fault for where, pair in placed.items() if (fault := _fault(where, pair, modules[where[0]], shapes))]
    if unfit:
        raise refused(f"{len(unfit)} of its layers do not fit the model's", unfit)
    return placed


def _absent(names: list[str]) -> Exception:
    return refused(
        f"it has {len(names)} layers that the model does not have, or that cannot be converted to its names", names
    )


def _locate(name: str, shapes: Shapes) -> Place | None:
    component, layer = split_name(name, shapes)
    layers = shapes.get(component, {})
    return next(((component, n) for n in (layer, layer.removeprefix(_NESTED_TEXT)) if n in layers), None)


def _is_known(module: nn.Module) -> bool:
    """Whether a product added to the weight is what the factors beside it would compute; with groups, it is not."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.groups == 1
    return isinstance(module, nn.Linear | FusedPart)


def _fault(where: Place, pair: Converted, module: nn.Module, shapes: Shapes) -> str | None:
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
