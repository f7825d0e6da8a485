"""What the names of layers in files mean, where they are the model's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..sizes import DENOISERS
from ..weights.layout import Layout

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Of the whole weights, by component and layer."""

Place = tuple[str, str]
"""A component and the name of a layer in it."""

FOREIGN = "diffusion_model."
"""Before the denoiser's layers, as ComfyUI and ai-toolkit write it."""

_PEFT_MODEL = "base_model.model."
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
    return denoiser, path.removeprefix(FOREIGN)


def locate(name: str, shapes: Shapes) -> Place | None:
    """The model's layer of that name."""
    component, layer = split_name(name, shapes)
    layers = shapes.get(component, {})
    return next(((component, n) for n in (layer, layer.removeprefix(_NESTED_TEXT)) if n in layers), None)
