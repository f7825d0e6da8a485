"""Finds the layers that a file names as the model does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ..pipelines.components import DENOISERS
from ..weights.checkpoint.layout import Layout

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Shapes of the whole weights, by component and layer."""

LayerRef = tuple[str, str]
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
        layer, _, kind = (entry.own or entry.tensor).rpartition(".")  # a fused tensor belongs to several layers
        if kind == "weight":
            yield layer, entry.shape


def split_name(name: str, shapes: Shapes) -> LayerRef:
    """The component and the layer that a name in a file means, if it is one that diffusers or peft gives."""
    path = name.removeprefix(_PEFT_MODEL)
    component, _, rest = path.partition(".")
    if component in shapes:
        return component, rest.removeprefix(_PEFT_MODEL)
    denoiser = next((found for found in DENOISERS if found in shapes), "")
    return denoiser, path.removeprefix(FOREIGN)


_DENOISER = ("lora_unet_", "lora_transformer_", "lycoris_")
_ENCODERS = {
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3", "text_encoder_2"),  # of FLUX, where sd-scripts also calls T5 the third
}


def locate_underscored(names: Iterable[str], shapes: Shapes) -> dict[str, LayerRef]:
    """The model's layers whose names are in ``names`` with underscores for dots, as sd-scripts and LyCORIS write them.

    Those that mean no layer are not in it, nor those that would mean several.
    """
    denoiser = next((found for found in DENOISERS if found in shapes), "")
    tables: dict[str, dict[str, list[str]]] = {}
    found: dict[str, LayerRef] = {}
    for name in names:
        for before, components in {**dict.fromkeys(_DENOISER, (denoiser,)), **_ENCODERS}.items():
            component = next((one for one in components if one in shapes), None)
            if component is None or not name.startswith(before):
                continue
            table = tables.setdefault(component, _by_underscored(shapes[component]))
            layer = name.removeprefix(before)
            layers = table.get(layer) or table.get(layer.removeprefix(_NESTED_TEXT.replace(".", "_"))) or []
            if len(layers) == 1:
                found[name] = (component, layers[0])
    return found


def _by_underscored(layers: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(layer.replace(".", "_"), []).append(layer)
    return found


def locate(name: str, shapes: Shapes) -> LayerRef | None:
    """The model's layer of that name."""
    component, layer = split_name(name, shapes)
    layers = shapes.get(component, {})
    return next(((component, n) for n in (layer, layer.removeprefix(_NESTED_TEXT)) if n in layers), None)
